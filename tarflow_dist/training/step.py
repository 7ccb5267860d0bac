"""One optimiser step over the global batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.config import Config, LossWeight
from tarflow_dist.data.loader import Batch
from tarflow_dist.flow.units import bits_per_dim, log_prob_of
from tarflow_dist.telemetry.pace import Pace
from tarflow_dist.training.augment import augment
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.health import BlockMonitor
from tarflow_dist.training.noise_bands import NoiseBands
from tarflow_dist.training.schedule import ema_decay, learning_rate
from tarflow_dist.training.state import RunState

MEAN_LOSS_RATE = 0.02


@dataclass
class StepResult:
    """What a step saw, on the device: nothing is awaited before `figures` asks for it.

    Attributes:
        sums: float64 sums over this rank's passes of [loss, mean z², each block's log|det| a
            dimension, each block's mean z²].
        passes: passes a rank.
        lr: the step's learning rate.
        grad_norm: norm of the gradient over all parameters, before clipping.
        problem: why the step was left out; None if it was taken.
        uniform: whether the loss is that of 8-bit images, with bits a dimension.
        bands: an iTARFlow's loss by noise level.
    """

    sums: Tensor
    passes: int
    lr: float
    grad_norm: float | Tensor
    problem: str | None
    uniform: bool
    bands: NoiseBands | None

    def figures(self) -> dict[str, float]:
        """Means over the global batch, in nats a dimension. Collective."""
        count = self.passes * distributed.world_size()
        loss, z2, *blocks = (distributed.sum_over_ranks(self.sums.clone()) / count).tolist()
        depth = len(blocks) // 2
        whole = {"loss": loss, "mean_z2": z2, "logdet": sum(blocks[:depth])}
        if self.uniform:
            whole["bits_per_dim"] = bits_per_dim(log_prob_of(loss))
        logdets = {f"logdet/block{t}": value for t, value in enumerate(blocks[:depth])}
        z2s = {f"mean_z2/block{t}": value for t, value in enumerate(blocks[depth:])}
        bands = {} if self.bands is None else self.bands.figures()
        norm = float(self.grad_norm)
        return {**whole, **bands, **logdets, **z2s, "grad_norm": norm, "lr": self.lr}


def loss_weight(rule: LossWeight, sigma: Tensor | None) -> Tensor | None:
    """The weight of each image (B,) in the loss, for its noise level; None weighs all alike."""
    if rule == "none" or sigma is None:
        return None
    return sigma if rule == "sigma" else sigma.square()


class Stepper:
    """Takes the run's optimiser steps: passes forward and backward over this rank's share of the
    batch, then the update of weights, average and prior."""

    def __init__(
        self,
        engine: Engine,
        batches: Iterator[Batch],
        config: Config,
        device: torch.device,
        pace: Pace,
    ):
        self._engine, self._batches, self._config = engine, batches, config
        self._device, self._pace = device, pace
        self._monitor = BlockMonitor(engine.flow)

    def step(self, state: RunState) -> StepResult:
        """Takes the step that follows `state`. One whose loss or gradient is not finite, or whose
        loss jumps, is left out on all ranks together: nothing changes but the position."""
        config, engine, flow = self._config, self._engine, self._engine.flow
        images = state.images + config.train.batch_size
        lr = learning_rate(config.optimizer, images, config.train.images)
        decay = ema_decay(config.optimizer, images, config.train.batch_size)
        passes = engine.accumulation_steps
        sums = torch.zeros(2 + len(flow.blocks), dtype=torch.float64, device=self._device)
        mean_square = torch.zeros_like(flow.var)
        levels = flow.sigma_range
        bands = None if levels is None else NoiseBands(levels, self._device)
        spike = None
        self._monitor.reset()
        for number in range(passes):
            with self._pace.waiting():
                batch = next(self._batches)
            with self._pace.working():
                x, y, sigma = augment(batch, config, self._device)
                z, logdets = engine(x, y, sigma)
                loss = flow.loss(z, logdets, loss_weight(config.train.loss_weight, sigma))
            with torch.no_grad():
                if bands is not None and sigma is not None:
                    bands.add(sigma, flow.losses(z, logdets))
                sums += torch.cat(
                    [torch.stack([loss, z.square().mean()]), logdets.mean(dim=1) / flow.num_dims]
                )
                if flow.volume_preserving:
                    mean_square += z.square().mean(dim=0) / passes
            if number == passes - 1 and config.health.loss_spike is not None:
                spike = self._spike(float(distributed.sum_over_ranks(sums[0].clone())), state)
            # a gradient that is not finite is how every ZeRO stage is told to leave a step out
            engine.backward(loss * math.nan if spike else loss)
            engine.step(lr=lr, ema_decay=decay)
        problem = spike
        if not engine.step_was_applied():
            problem = spike or f"{self._monitor.offender(sums[0])} is not finite"
        elif flow.volume_preserving:
            flow.update_prior(distributed.sum_over_ranks(mean_square) / distributed.world_size())
        sums = torch.cat([sums, self._monitor.mean_z2])
        uniform = flow.noise == "uniform"
        return StepResult(sums, passes, lr, engine.grad_norm(), problem, uniform, bands)

    def _spike(self, loss_sum: float, state: RunState) -> str | None:
        """Whether the step's loss, summed over all passes and ranks, jumps above its recent average
        in `state`, which it otherwise joins."""
        limit = self._config.health.loss_spike
        assert limit is not None
        loss = loss_sum / (self._engine.accumulation_steps * distributed.world_size())
        mean = state.mean_loss
        if mean is not None and loss > mean + limit:
            return f"its loss {loss:.4g} is more than {limit} above the recent average {mean:.4g}"
        if math.isfinite(loss):
            rate = MEAN_LOSS_RATE
            state.mean_loss = loss if mean is None else mean + rate * (loss - mean)
        return None
