"""One optimiser step over the global batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.data.loader import Batch
from tarflow_dist.telemetry.throughput import Throughput
from tarflow_dist.training.checkpoint import RunState
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.objective import Objective
from tarflow_dist.training.schedule import ema_decay, learning_rate

MEAN_LOSS_RATE = 0.02


@dataclass
class Stepper:
    """Takes the run's optimiser steps: passes forward and backward over this rank's share of the
    batch, then the update of weights and average."""

    engine: Engine
    objective: Objective
    batches: Iterator[Batch]
    config: Config
    throughput: Throughput

    def step(self, state: RunState) -> str | None:
        """Takes the step that follows `state`. One whose loss or gradient is not finite, or whose
        loss jumps, is left out on all ranks together: nothing changes but the position.

        Returns:
            Why it was left out; None if it was taken.
        """
        config, engine, objective = self.config, self.engine, self.objective
        images = state.images + config.train.batch_size
        self._lr = learning_rate(config.optimizer, images, config.train.images)
        decay = ema_decay(config.optimizer, images, config.train.batch_size)
        total = torch.zeros((), dtype=torch.float64, device=engine.flow.device)
        spike = None
        objective.begin_step()
        for number in range(engine.accumulation_steps):
            with self.throughput.waiting():
                batch = next(self.batches)
            with self.throughput.working():
                loss = objective.loss(batch)
            total += loss.detach()
            last = number == engine.accumulation_steps - 1
            if last and config.health.loss_spike is not None:
                spike = self._spike(float(distributed.sum_over_ranks(total.clone())), state)
            # a gradient that is not finite is how every ZeRO stage is told to leave a step out
            engine.backward(loss * math.nan if spike else loss)
            engine.step(lr=self._lr, ema_decay=decay)
        applied = engine.step_was_applied()
        objective.end_step(applied=applied)
        if applied and not spike:
            return None
        return spike or f"{objective.culprit(total)} is not finite"

    def figures(self) -> dict[str, float]:
        """Of the last step, means over the global batch: nothing on the device is awaited before
        they are asked for. Collective."""
        norm = float(self.engine.grad_norm())  # over all parameters, before clipping
        return {**self.objective.figures(), "grad_norm": norm, "lr": self._lr}

    def _spike(self, loss_sum: float, state: RunState) -> str | None:
        """Whether the step's loss, summed over all passes and ranks, jumps above its recent average
        in `state`, which it otherwise joins."""
        limit = self.config.health.loss_spike
        assert limit is not None
        loss = loss_sum / (self.engine.accumulation_steps * distributed.world_size())
        mean = state.mean_loss
        if mean is not None and loss > mean + limit:
            return f"its loss {loss:.4g} is more than {limit} above the recent average {mean:.4g}"
        if math.isfinite(loss):
            rate = MEAN_LOSS_RATE
            state.mean_loss = loss if mean is None else mean + rate * (loss - mean)
        return None
