"""The training loop: step, log, checkpoint, until the run's images are seen."""

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.data.loader import train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards
from tarflow_dist.training import checkpoint, run_folder
from tarflow_dist.training.interrupt import Interrupt
from tarflow_dist.training.journal import Journal
from tarflow_dist.training.start import build_engine, open_data, restore
from tarflow_dist.training.step import train_step


def train(config: Config, device: torch.device) -> bool:
    """Trains the run of `config` from its newest checkpoint, or from the start.

    Returns:
        True at the run's end; False if it was interrupted, after saving.

    Raises:
        UserError: data, run folder or checkpoint do not fit the config, a checkpoint can't be
            written, or the gradient is no longer finite.
    """
    micro_batch_size = config.micro_batch(distributed.world_size())
    shards = open_data(config)
    with run_folder.locked(config):
        return _train(config, shards, micro_batch_size, device)


def _train(config: Config, shards: Shards, micro_batch_size: int, device: torch.device) -> bool:
    batch_size = config.train.batch_size
    changes = run_folder.changes_since_start(config)
    engine = build_engine(config, micro_batch_size, device)
    state = restore(config, engine)
    batches = train_batches(
        shards,
        ImageOrder(shards.sizes, seed=config.seed, window=config.data.shuffle_window),
        position=state.images,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=config.data.num_workers,
    )
    with Journal(config, state, changes) as journal, Interrupt() as interrupt:
        stop = False
        while state.images < config.train.images and not stop:
            step = train_step(engine, batches, config, device, state.images + batch_size)
            state.images += batch_size
            stop = distributed.any_rank(interrupt.requested)  # the same answer on every rank

            finished = state.images >= config.train.images

            if finished or state.passed(config.log.every_images, batch_size):
                journal.write_row(step)
            journal.advance(batch_size)

            due = state.passed(config.checkpoint.every_images, batch_size)
            if due or finished or stop:
                state.optimizer_steps = engine.optimizer_steps
                checkpoint.save(
                    config.run / checkpoint.FOLDER,
                    engine.tensors(),
                    state,
                    model=engine.flow.config,
                    keep=config.checkpoint.keep,
                )
                journal.record_progress()
    return state.images >= config.train.images
