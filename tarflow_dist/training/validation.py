"""What is seen of the averaged weights as the run goes: their held-out loss, and samples."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.data.loader import Batch, eval_batches
from tarflow_dist.data.shards import Shards
from tarflow_dist.files import write_whole
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.telemetry.pictures import picture_grid
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.objective import Objective

PREVIEWS = "previews"


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
    flow = _averaged_flow(engine, config, torch.float32)
    return objective.held_out_loss(flow, told())


def draw_preview(engine: Engine, objective: Objective, config: Config, images: int) -> Path | str:
    """Draws `config.preview` at `images` seen, on rank 0: on a GPU a batch takes little longer
    than a single sample. Collective, for all have a part of the averaged weights.

    Returns:
        The PNG, or why the samples can't be shown: a young model's may not be finite, and there may
        not be the memory beside training, or the room on the disk.
    """
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    flow = _averaged_flow(engine, config, dtype)
    file = config.run / PREVIEWS / f"{images:011d}.png"
    if not distributed.is_main():
        return file
    try:
        samples = objective.draw(flow)
        columns = math.ceil(math.sqrt(len(samples)))
        rows = [samples[i : i + columns] for i in range(0, len(samples), columns)]
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(file) as part:
            picture_grid(rows).save(part, "PNG")
    except (ValueError, torch.OutOfMemoryError) as error:
        return str(error)
    except OSError as error:
        return f"{file} can't be written ({error.strerror})"
    return file


def _averaged_flow(engine: Engine, config: Config, dtype: torch.dtype) -> TarFlow:
    """The flow that the run would leave if it ended now, whole on every rank. Collective."""
    average = {name: tensor.to(dtype) for name, tensor in engine.average()}
    flow = TarFlow.with_weights(engine.flow.config, average, source=config.run)
    return flow.requires_grad_(False)
