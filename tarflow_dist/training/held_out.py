"""The loss on held-out images, as the run goes."""

from collections.abc import Callable, Iterator

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.data.loader import Batch, eval_batches
from tarflow_dist.data.shards import Shards
from tarflow_dist.training.averaged import averaged_flow
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.objective import Objective


def held_out_loss(
    engine: Engine,
    objective: Objective,
    shards: Shards,
    config: Config,
    batch_size: int,
    alive: Callable[[], None],
) -> float:
    """The averaged weights' loss on `config.eval.count` images of `shards`. Collective.

    Args:
        batch_size: images a rank takes through the flow at once.
        alive: called at each batch.
    """
    batches = eval_batches(
        shards,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=config.data.num_workers,
        count=config.eval.count,
    )

    def told() -> Iterator[Batch]:
        for batch in batches:
            alive()
            yield batch

    # bf16 weights would put the third digit off
    flow = averaged_flow(engine, torch.float32)
    return objective.held_out_loss(flow, told())
