"""The objective of TARFlow and iTARFlow: exact maximum likelihood of images with noise."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.config import Config, LossWeight
from tarflow_dist.data.loader import Batch
from tarflow_dist.flow.bits_per_dim import loss_of
from tarflow_dist.models.likelihood import mean_log_prob
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.training.augment import augment
from tarflow_dist.training.block_monitor import BlockMonitor
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.step_metrics import StepMetrics


class MaximumLikelihood:
    """The `Objective` −log p(x | y) in nats a dimension, less a constant (arXiv 2412.06329,
    equation 6), of an iTARFlow weighted by the images' noise levels."""

    def __init__(self, engine: Engine, config: Config, device: torch.device):
        self._engine, self._config, self._device = engine, config, device
        self._monitor = BlockMonitor(engine.flow)

    def begin_step(self) -> None:
        self._metrics = StepMetrics(self._engine.flow, self._device)
        self._mean_squares: list[Tensor] = []  # of the prior's variance: (N, D) a pass
        self._monitor.reset()

    def loss(self, batch: Batch) -> Tensor:
        flow = self._engine.flow
        x, y, sigma = augment(batch, self._config, self._device)
        z, logdets = self._engine(x, y, sigma)
        if sigma is None:
            loss = flow.loss(z, logdets)
        else:
            losses = flow.losses(z, logdets)
            loss = (loss_weight(self._config.train.loss_weight, sigma) * losses).mean()
            self._metrics.add_by_noise_level(sigma, losses)
        self._metrics.add(loss, z, logdets)
        if flow.volume_preserving:
            self._mean_squares.append(z.detach().square().mean(dim=0))
        return loss

    def culprit(self, loss: Tensor) -> str:
        return self._monitor.offender(loss)

    def end_step(self, *, applied: bool) -> None:
        flow = self._engine.flow
        if applied and flow.volume_preserving:
            mine = torch.stack(self._mean_squares).mean(dim=0)
            total = distributed.sum_over_ranks(mine)
            flow.update_prior(total / distributed.world_size())

    def figures(self) -> dict[str, float]:
        return self._metrics.figures(self._monitor.mean_z2)

    def held_out_loss(self, flow: TarFlow, batches: Iterable[Batch]) -> float:
        """In nats a dimension, without weights."""
        return loss_of(mean_log_prob(flow, batches, draws=1, seed=self._config.seed))

    def draw(self, flow: TarFlow, index: Tensor, count: int) -> NDArray[np.uint8]:
        preview = self._config.preview
        drawn = flow.sample(
            index * flow.num_classes // count if flow.num_classes else None,
            index=index,
            seed=self._config.seed,
            guidance=preview.guidance,
            annealed=preview.annealed,
            attn_temp=preview.attn_temp,
        )
        return drawn.cpu().numpy()


def loss_weight(rule: LossWeight, sigma: Tensor) -> Tensor:
    """The weight of each image in the loss, for its noise level (B,)."""
    if rule == "none":
        return torch.ones_like(sigma)
    return sigma if rule == "sigma" else sigma.square()
