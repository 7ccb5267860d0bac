"""The objective of TARFlow and iTARFlow: exact maximum likelihood of images with noise."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist import distributed, rng
from tarflow_dist.config import Config, LossWeight
from tarflow_dist.data.loader import Batch
from tarflow_dist.flow.bits_per_dim import loss_of
from tarflow_dist.models.likelihood import mean_log_prob, with_noise
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.training.engine import Engine
from tarflow_dist.training.step_metrics import StepMetrics


class MaximumLikelihood:
    """The `Objective` −log p(x | y) in nats a dimension, less a constant (arXiv 2412.06329,
    equation 6), of an iTARFlow weighted by the images' noise levels."""

    def __init__(self, engine: Engine, config: Config):
        self._engine, self._config = engine, config
        self._metrics = StepMetrics(engine.flow)

    def begin_step(self) -> None:
        self._metrics.begin_step()
        self._mean_squares: list[Tensor] = []  # of the prior's variance: (N, D) a pass

    def loss(self, batch: Batch) -> Tensor:
        flow = self._engine.flow
        x, y, sigma = augment(batch, self._config, flow.device)
        z, logdets = self._engine(x, y, sigma)
        rule = self._config.train.loss_weight
        loss = flow.loss(z, logdets, None if sigma is None else loss_weight(rule, sigma))
        self._metrics.add(loss, z, logdets, sigma)
        if flow.volume_preserving:
            self._mean_squares.append(z.detach().square().mean(dim=0))
        return loss

    def culprit(self, loss: Tensor) -> str:
        return self._metrics.culprit(loss)

    def figures(self) -> dict[str, float]:
        return self._metrics.figures()

    def end_step(self, *, applied: bool) -> None:
        flow = self._engine.flow
        if applied and flow.volume_preserving:
            mine = torch.stack(self._mean_squares).mean(dim=0)
            total = distributed.sum_over_ranks(mine)
            flow.update_prior(total / distributed.world_size())

    def held_out_loss(self, flow: TarFlow, batches: Iterable[Batch]) -> float:
        """In nats a dimension, without weights."""
        return loss_of(mean_log_prob(flow, batches, draws=1, seed=self._config.seed))

    def draw(self, flow: TarFlow) -> NDArray[np.uint8]:
        preview = self._config.preview
        index = torch.arange(preview.count)
        drawn = flow.sample(
            index * flow.num_classes // preview.count if flow.num_classes else None,
            index=index,
            seed=self._config.seed,
            guidance=preview.guidance,
            annealed=preview.annealed,
            attn_temp=preview.attn_temp,
        )
        return drawn.cpu().numpy()


def augment(
    batch: Batch, config: Config, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A batch to what the flow trains on, on the device: flips, noise and dropped labels, all of it
    a function of (seed, epoch, image index), never of rank, world size or batch.

    Returns:
        Noisy images (B, C, H, W) float32; labels (B,) int64 with −1 where dropped, or None for an
        unconditional model; the images' noise levels (B,) float32, or None where the level is no
        condition.
    """
    pixels = batch.images.to(device, non_blocking=True)
    index = batch.index.to(device, non_blocking=True)
    epoch = batch.epoch.to(device, non_blocking=True)

    def uniform(shape: tuple[int, ...], purpose: str) -> Tensor:
        return rng.uniform(shape, seed=config.seed, purpose=purpose, index=index, epoch=epoch)

    if config.data.flip:
        mirrored = uniform((1, 1, 1), "flip") < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    model = config.model
    x, levels = with_noise(
        pixels,
        model,
        config.train.noise_levels,
        seed=config.seed,
        purpose="noise",
        index=index,
        epoch=epoch,
    )
    if not model.num_classes:
        return x.float(), None, levels
    labels = batch.labels.to(device, non_blocking=True)
    if config.train.label_drop:
        labels = labels.masked_fill(uniform((), "label drop") < config.train.label_drop, -1)
    return x.float(), labels, levels


def loss_weight(rule: LossWeight, sigma: Tensor) -> Tensor:
    """The weight of each image in the loss, for its noise level (B,)."""
    if rule == "none":
        return torch.ones_like(sigma)
    return sigma if rule == "sigma" else sigma.square()
