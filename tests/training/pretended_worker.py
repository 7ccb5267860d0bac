"""Run by test_pretended_cuda.py: training steps of the real engine on a pretended GPU, a ZeRO stage
a process; then a checkpoint, a preview, and a step from the checkpoint. Writes what it saw as JSON:
the losses, the waits of each step and of the saving, and how many tensors were saved.

    pretended_worker.py CONFIG OUT DEVICE OVERRIDE…
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pretended_job import pretended_job

from tarflow_dist import config_file as configs
from tarflow_dist import distributed
from tarflow_dist.config import Config

STEPS = 3


def main(config_file: str, out: str, device: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    config = configs.load(Path(config_file), list(overrides))
    with ExitStack() as patches:
        waits = patches.enter_context(pretended_job()).waits if device == "cuda" else {}
        where = distributed.init()
        assert where.type == device
        seen = train(config, where, waits)
        if distributed.is_main():
            Path(out).write_text(json.dumps(seen))
        distributed.barrier()
        os._exit(0)  # nothing of a pretended card's is taken down


def train(config: Config, device: torch.device, waits: dict[str, int]) -> dict[str, Any]:
    from tarflow_dist.telemetry.throughput import Throughput
    from tarflow_dist.training.checkpoint import RunState
    from tarflow_dist.training.latest_checkpoint import FOLDER
    from tarflow_dist.training.maximum_likelihood import MaximumLikelihood
    from tarflow_dist.training.saver import Saver
    from tarflow_dist.training.setup import build_engine, restore
    from tarflow_dist.training.step import Stepper
    from tarflow_dist.training.validation import draw_preview

    engine = build_engine(config, config.micro_batch(distributed.world_size()), device)
    state = RunState(images=config.optimizer.warmup_images)
    objective = MaximumLikelihood(engine, config)
    stepper = Stepper(
        engine,
        objective,
        batches(config, engine.flow.image_shape),
        config,
        Throughput(config, device, 0),
    )
    losses, waited = [], []

    def step() -> None:
        waits.clear()
        problem = stepper.step(state)
        waited.append(dict(waits))
        state.images += config.train.batch_size
        assert problem is None, problem
        losses.append(stepper.figures()["loss"])

    for _ in range(STEPS):
        step()
    assert engine.is_finite()
    state.optimizer_steps = engine.optimizer_steps
    saver = Saver(config.run / FOLDER, config.checkpoint, engine.flow.config)
    waits.clear()
    saver.save(engine.pieces(), state)
    to_save = dict(waits)
    saver.publish()
    picture = draw_preview(engine, objective, config, state.images)
    assert isinstance(picture, Path), picture
    before = saved(engine)
    assert restore(config, engine) == state
    after = saved(engine)
    assert all(torch.equal(after[key], values) for key, values in before.items())
    step()
    return {"losses": losses, "waits": waited, "to_save": to_save, "tensors": len(before)}


def saved(engine: Any) -> dict[str, torch.Tensor]:
    """What the only rank adds to a checkpoint, in host memory."""
    return {
        f"{kind}/{piece.name}": values.to("cpu", copy=True)
        for piece in engine.pieces()
        for kind, values in piece.values.items()
    }


def batches(config: Config, image_shape: tuple[int, ...]) -> Iterator[Any]:
    from tarflow_dist.data.loader import Batch

    """The same for any number of ranks, dealt out pass by pass."""
    rank, ranks = distributed.rank(), distributed.world_size()
    size = config.micro_batch(ranks)
    generator = torch.Generator().manual_seed(1)
    zeros = torch.zeros(size, dtype=torch.int64)
    for number in count():
        images = torch.randint(256, (size, *image_shape), generator=generator, dtype=torch.uint8)
        if number % ranks == rank:
            yield Batch(images, torch.arange(size) % 10, torch.arange(size), zeros)


if __name__ == "__main__":
    main(*sys.argv[1:])
