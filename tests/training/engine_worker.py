"""Run under torchrun by test_engine.py: trains a small flow on fixed batches through the engine and
writes what it saw as JSON."""

import json
import sys
from pathlib import Path

import torch

from tarflow_dist import config as configs
from tarflow_dist import distributed
from tarflow_dist.flow.model import Flow
from tarflow_dist.training import checkpoint
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.state import RunState

STEPS, BATCH, LR, EMA_DECAY = 8, 16, 1e-3, 0.9


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator) * 0.5
    return images, torch.randint(-1, 10, (BATCH,), generator=generator)


def new_flow(config: configs.Config) -> Flow:
    torch.manual_seed(0)
    return Flow(**config.model.model_dump())


def train(engine: Engine, config: configs.Config, steps: range) -> list[float]:
    """The global batch's loss at each step."""
    rank, world_size = distributed.rank(), distributed.world_size()
    size = config.micro_batch(world_size)
    losses = []
    for step in steps:
        images, labels = batch(step)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(engine.accumulation_steps):
            start = (rank * engine.accumulation_steps + i) * size
            part = slice(start, start + size)
            loss = engine.flow.loss(*engine(images[part], labels[part]))
            engine.backward(loss)
            engine.step(lr=LR, ema_decay=EMA_DECAY)
            total += loss.detach() / engine.accumulation_steps
        losses.append(float(distributed.sum_over_ranks(total) / world_size))
    return losses


def main(out: Path, config_file: Path, *overrides: str) -> None:
    distributed.init()
    config = configs.load(config_file, overrides)
    micro = config.micro_batch(distributed.world_size())
    engine = Engine(new_flow(config), config, micro)
    half = STEPS // 2
    losses = train(engine, config, range(half))
    state = RunState(images=half * BATCH, optimizer_steps=engine.optimizer_steps)
    folder = checkpoint.save(
        out.parent / f"{out.stem}-checkpoints",
        engine.tensors(),
        state,
        model=engine.flow.config,
        keep=1,
    )
    losses += train(engine, config, range(half, STEPS))
    norm = engine.grad_norm()

    saved = checkpoint.Checkpoint(folder)
    resumed = Engine(new_flow(config), config, micro)
    resumed.load(saved.read, saved.state.optimizer_steps)
    again = train(resumed, config, range(half, STEPS))
    if distributed.is_main():
        seen = {"losses": losses, "resumed": again, "grad_norm": norm, "folder": str(folder)}
        out.write_text(json.dumps(seen))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
