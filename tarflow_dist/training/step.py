"""One optimiser step over the global batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.data.loader import Batch
from tarflow_dist.errors import UserError
from tarflow_dist.training.augment import augment
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.schedule import ema_decay, learning_rate


@dataclass
class StepResult:
    """What a step saw, on the device: nothing is awaited before `figures` asks for it.

    Attributes:
        sums: float64 sums over this rank's passes of [loss, mean z², each block's log|det| a
            dimension].
        passes: passes a rank.
        lr: the step's learning rate.
        grad_norm: norm of the gradient over all parameters, before clipping.
    """

    sums: Tensor
    passes: int
    lr: float
    grad_norm: float

    def figures(self) -> dict[str, float]:
        """Means over the global batch, in nats a dimension. Collective."""
        count = self.passes * distributed.world_size()
        loss, z2, *logdets = (distributed.sum_over_ranks(self.sums.clone()) / count).tolist()
        blocks = {f"logdet/block{t}": value for t, value in enumerate(logdets)}
        whole = {"loss": loss, "mean_z2": z2, "logdet": sum(logdets)}
        return {**whole, **blocks, "grad_norm": self.grad_norm, "lr": self.lr}


def train_step(
    engine: Engine, batches: Iterator[Batch], config: Config, device: torch.device, images: int
) -> StepResult:
    """Takes one step, which ends at `images` seen: passes forward and backward over this rank's
    share of the batch, then the update of weights, average and prior.

    Raises:
        UserError: on every rank, if the gradient is not finite. Nothing of the step must be saved.
    """
    flow = engine.flow
    lr = learning_rate(config.optimizer, images, config.train.images)
    decay = ema_decay(config.optimizer, images, config.train.batch_size)
    passes = engine.accumulation_steps
    sums = torch.zeros(2 + len(flow.blocks), dtype=torch.float64, device=device)
    mean_square = torch.zeros_like(flow.var)
    for _ in range(passes):
        z, logdets = engine(*augment(next(batches), config, device))
        loss = flow.loss(z, logdets)
        engine.backward(loss)
        engine.step(lr=lr, ema_decay=decay)
        with torch.no_grad():
            sums += torch.cat(
                [torch.stack([loss, z.square().mean()]), logdets.mean(dim=1) / flow.num_dims]
            )
            if flow.volume_preserving:
                mean_square += z.square().mean(dim=0) / passes
    grad_norm = engine.grad_norm()
    if not (engine.step_was_applied() and math.isfinite(grad_norm)):
        raise UserError(
            f"the gradient is not finite in the step to {images} images: the same command goes on "
            "from the last checkpoint, with a lower optimizer.lr if it happens again"
        )
    if flow.volume_preserving:
        flow.update_prior(distributed.sum_over_ranks(mean_square) / distributed.world_size())
    return StepResult(sums, passes, lr, grad_norm)
