"""The training loop: step, log, checkpoint, preview, until the run's images are seen."""

import math
import time
from contextlib import ExitStack

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.data.loader import train_batches
from tarflow_dist.models.classes import NAMELESS
from tarflow_dist.telemetry.throughput import Throughput
from tarflow_dist.training import latest_checkpoint, run_folder
from tarflow_dist.training.health import Health, Interrupt, watchdog
from tarflow_dist.training.maximum_likelihood import MaximumLikelihood
from tarflow_dist.training.run_log import RunLog
from tarflow_dist.training.saver import Saver
from tarflow_dist.training.setup import (
    build_engine,
    choose_micro_batch,
    image_order,
    open_data,
    recognise_data,
    restore,
)
from tarflow_dist.training.step import Stepper
from tarflow_dist.training.validation import draw_preview, held_out_loss
from tarflow_dist.training.warm_start import warm_start


def train(config: Config, device: torch.device) -> bool:
    """Trains the run of `config` from its newest checkpoint, or from the start.

    Returns:
        True at the run's end; False if it was interrupted, after saving.

    Raises:
        UserError: data, run folder or checkpoint do not fit the config, a checkpoint can't be
            written, or the run diverges and going back to a checkpoint does not help.
    """
    batch_size = config.train.batch_size
    with ExitStack() as stack:
        alive = stack.enter_context(watchdog(config.health))
        interrupt = stack.enter_context(Interrupt(config.train.stop_after))
        micro_batch_size = choose_micro_batch(config, device)
        shards = open_data(config, "train")
        val_shards = None if config.eval.every_images is None else open_data(config, "val")
        stack.enter_context(distributed.lock_folder(config.run))
        changes = run_folder.changes_since_start(config)
        if micro_batch_size < config.micro_batch(distributed.world_size()):
            changes.append(f"its batch goes through {micro_batch_size} images at a time")
        engine = build_engine(config, micro_batch_size, device)
        classes = shards.classes if config.model.num_classes else NAMELESS
        objective = MaximumLikelihood(engine, config)
        state = restore(config, engine)
        if config.init is not None and state.images == 0:
            read, said = warm_start(config, classes)
            engine.load(read, optimizer_steps=0)
            changes += said
        changes += recognise_data(state, shards)
        batches = train_batches(
            shards,
            image_order(config, state, shards),
            position=state.images,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=config.data.num_workers,
        )
        throughput = Throughput(config, device, state.images)
        stepper = Stepper(engine, objective, batches, config, throughput)
        saver = Saver(
            config.run / latest_checkpoint.FOLDER, config.checkpoint, engine.flow.config, classes
        )
        health = Health(config, engine)
        anyone = distributed.AnyRank(device)
        log = stack.enter_context(RunLog(config, state, changes, throughput))
        stop = False
        while state.images < config.train.images and not stop:
            anyone.ask(interrupt.requested, saver.writing)
            problem = stepper.step(state)
            state.images += batch_size
            alive()
            diverged = health.judge(problem, state)  # why the run should go back, if so
            stop, writing = anyone.answers()  # the same on every rank
            finished = state.images >= config.train.images

            if finished or state.passed(config.log.every_images, batch_size):
                log.write_row(stepper.figures(), stall_seconds=saver.stall_seconds)
            state.val_loss = None
            measured = finished or state.passed(config.eval.every_images, batch_size)
            if val_shards is not None and measured:
                began = time.monotonic()
                loss = held_out_loss(engine, objective, val_shards, config, micro_batch_size, alive)
                log.write_val_loss(loss, seconds=time.monotonic() - began)
                state.val_loss = loss if math.isfinite(loss) else None
            log.advance(batch_size)

            if not writing:
                saver.publish()
            due = state.passed(config.checkpoint.every_images, batch_size)
            if due or finished or stop:
                if engine.is_finite():
                    state.optimizer_steps = engine.optimizer_steps
                    log.sync()
                    saver.save(engine.pieces(), state)
                    log.record_status()
                else:
                    diverged = "the weights are no longer finite"
            if diverged is not None:
                saver.publish()
                health.go_back(state, diverged)
            if state.passed(config.preview.every_images, batch_size):
                log.show_preview(draw_preview(engine, objective, config, state.images))
        saver.publish()
        log.record_status()
    return state.images >= config.train.images
