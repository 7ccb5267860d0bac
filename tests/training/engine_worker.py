"""Run under torchrun by test_engine.py: trains a small flow on fixed batches through the engine, in
one setting after another, and writes what it saw as JSON.

    engine_worker.py CONFIG CELLS OUT [FOLDER]

CELLS maps names to overrides of CONFIG; FOLDER is a checkpoint that each cell goes on from, too.
"""

import json
import sys
from pathlib import Path

import torch

from tarflow_dist import config_file as configs
from tarflow_dist import distributed
from tarflow_dist.config import CheckpointConfig, Config
from tarflow_dist.flow.model import Flow
from tarflow_dist.training import engine as engines
from tarflow_dist.training.checkpoint import Checkpoint, RunState
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.latest_checkpoint import newest
from tarflow_dist.training.saver import Saver

STEPS, BATCH, LR, EMA_DECAY = 8, 16, 1e-3, 0.9
HALF = STEPS // 2
VARIANCE = 0.3  # of the prior, which this flow keeps but doesn't use
engines.BUCKET = 10_000  # so that ZeRO 1 and 2 have many, in flight together, of so small a flow


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator) * 0.5
    return images, torch.randint(-1, 10, (BATCH,), generator=generator)


def new_flow(config: Config) -> Flow:
    torch.manual_seed(0)
    return Flow(**config.model.to_json())


def new_engine(config: Config) -> Engine:
    return Engine(new_flow(config), config, config.micro_batch(distributed.world_size()))


def train(engine: Engine, config: Config, steps: range) -> list[float]:
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


def go_on_from(folder: Path, engine: Engine, config: Config) -> list[float]:
    saved = Checkpoint(folder)
    engine.load(saved.read_part, saved.state.optimizer_steps)
    return train(engine, config, range(HALF, STEPS))


def values_read(folder: Path, engine: Engine) -> int:
    """By all ranks, of the parameters: each reads the buffers whole."""
    saved, read = Checkpoint(folder), torch.zeros((), dtype=torch.int64)

    def counted(key: str, start: int, stop: int) -> torch.Tensor:
        if not key.startswith("buffers/"):
            read.add_(stop - start)
        return saved.read_part(key, start, stop)

    engine.load(counted, saved.state.optimizer_steps)
    return int(distributed.sum_over_ranks(read))


def run_cell(config: Config, folder: Path, elsewhere: Path | None) -> dict:
    engine = new_engine(config)
    losses = train(engine, config, range(HALF))
    engine.flow.var.fill_(VARIANCE)
    saver = Saver(folder, CheckpointConfig(every_images=1), engine.flow.config)
    saver.save(
        engine.pieces(), RunState(images=HALF * BATCH, optimizer_steps=engine.optimizer_steps)
    )
    engine.flow.var.zero_()
    losses += train(engine, config, range(HALF, STEPS))  # while it is written
    norm = float(engine.grad_norm())
    saver.publish()
    checkpoint = newest(folder)
    assert checkpoint is not None
    other = new_engine(config)
    return {
        "losses": losses,
        "grad_norm": norm,
        "checkpoint": str(checkpoint),
        "resumed": go_on_from(checkpoint, other, config),
        "rolled back": go_on_from(checkpoint, engine, config),
        "variances": [e.flow.var.unique().tolist() for e in (engine, other)],
        "from elsewhere": elsewhere and go_on_from(elsewhere, engine, config),
        "read": values_read(checkpoint, engine),
    }


def main(config_file: Path, cells: Path, out: Path, elsewhere: Path | None = None) -> None:
    distributed.init()
    seen = {}
    for name, overrides in json.loads(cells.read_text()).items():
        config = configs.load(config_file, overrides)
        seen[name] = run_cell(config, out.parent / name, elsewhere)
    if distributed.is_main():
        out.write_text(json.dumps(seen))
    distributed.shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
