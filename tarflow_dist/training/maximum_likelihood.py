"""The objective of TARFlow and iTARFlow: exact maximum likelihood of images with noise."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.config import Config, LossWeight
from tarflow_dist.data.loader import Batch
from tarflow_dist.flow.bits_per_dim import bits_per_dim, log_prob_of, loss_of
from tarflow_dist.likelihood import mean_log_prob
from tarflow_dist.pretrained import TarFlow
from tarflow_dist.training.augment import augment
from tarflow_dist.training.block_monitor import BlockMonitor
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.noise_bands import NoiseBands


class MaximumLikelihood:
    """The `Objective` −log p(x | y) in nats a dimension, less a constant (arXiv 2412.06329,
    equation 6), of an iTARFlow weighted by the images' noise levels."""

    def __init__(self, engine: Engine, config: Config, device: torch.device):
        self._engine, self._config, self._device = engine, config, device
        self._monitor = BlockMonitor(engine.flow)

    def begin_step(self) -> None:
        flow = self._engine.flow
        self._passes = 0
        # of [loss, mean z², each block's log|det| a dimension], over this rank's passes
        self._sums = torch.zeros(2 + len(flow.blocks), dtype=torch.float64, device=self._device)
        self._mean_square = torch.zeros_like(flow.var)
        levels = flow.sigma_range
        self._bands = None if levels is None else NoiseBands(levels, self._device)
        self._monitor.reset()

    def loss(self, batch: Batch) -> Tensor:
        flow = self._engine.flow
        x, y, sigma = augment(batch, self._config, self._device)
        z, logdets = self._engine(x, y, sigma)
        if sigma is None or self._bands is None:
            loss = flow.loss(z, logdets)
        else:
            losses = flow.losses(z, logdets)
            self._bands.add(sigma, losses.detach())
            loss = (loss_weight(self._config.train.loss_weight, sigma) * losses).mean()
        with torch.no_grad():
            self._passes += 1
            seen = [torch.stack([loss, z.square().mean()]), logdets.mean(dim=1) / flow.num_dims]
            self._sums += torch.cat(seen)
            if flow.volume_preserving:
                self._mean_square += z.square().mean(dim=0)
        return loss

    def culprit(self, loss: Tensor) -> str:
        return self._monitor.offender(loss)

    def end_step(self, *, applied: bool) -> None:
        flow = self._engine.flow
        if applied and flow.volume_preserving:
            total = distributed.sum_over_ranks(self._mean_square / self._passes)
            flow.update_prior(total / distributed.world_size())

    def figures(self) -> dict[str, float]:
        """In nats a dimension."""
        sums = torch.cat([self._sums, self._monitor.mean_z2])
        count = self._passes * distributed.world_size()
        loss, z2, *blocks = (distributed.sum_over_ranks(sums) / count).tolist()
        depth = len(blocks) // 2
        whole = {"loss": loss, "mean_z2": z2, "logdet": sum(blocks[:depth])}
        if self._engine.flow.noise == "uniform":
            whole["bits_per_dim"] = bits_per_dim(log_prob_of(loss))
        bands = {} if self._bands is None else self._bands.figures()
        logdets = {f"logdet/block{t}": value for t, value in enumerate(blocks[:depth])}
        z2s = {f"mean_z2/block{t}": value for t, value in enumerate(blocks[depth:])}
        return {**whole, **bands, **logdets, **z2s}

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
