"""How likely a model finds images that it was not trained on."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.data.loader import Batch
from tarflow_dist.distributed import sum_over_ranks
from tarflow_dist.flow.config import FlowConfig, NoiseLevels
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.noise import add_gaussian, dequantise, noise_levels


@torch.no_grad()
def mean_log_prob(flow: Flow, batches: Iterable[Batch], *, draws: int, seed: int) -> float:
    """log p(x | y) in nats a dimension under the model's own training noise: the mean over all
    ranks' images and over `draws` of the noise; an iTARFlow's has levels uniform in its range. Draw
    d of image i is the same on any rank."""
    total = torch.zeros((), dtype=torch.float64, device=flow.device)
    count = torch.zeros_like(total)
    for batch in batches:
        pixels, index = batch.images.to(flow.device), batch.index.to(flow.device)
        labels = batch.labels.to(flow.device) if flow.num_classes else None
        for draw in range(draws):
            x, sigma = with_noise(
                pixels,
                flow.config,
                "uniform",
                seed=seed,
                purpose="held out",
                index=index,
                epoch=draw,
            )
            total += flow.log_prob(x, labels, sigma).double().sum()
            count += len(pixels)
    sum_over_ranks(total)
    sum_over_ranks(count)
    return float(total / count) / flow.num_dims


def with_noise(
    pixels: Tensor,
    model: FlowConfig,
    levels: NoiseLevels,
    *,
    seed: int,
    purpose: str,
    index: Tensor,
    epoch: Tensor | int,
) -> tuple[Tensor, Tensor | None]:
    """Images as `model` is trained on them, a function of (seed, purpose, epoch, image index).

    Args:
        pixels: uint8 (B, C, H, W).
        levels: how an iTARFlow's noise levels are distributed.
        index: (B,).
        epoch: (B,), or one for all.

    Returns:
        The images with noise, (B, C, H, W), and float32 noise levels (B,) where the level is a
        condition, or None.
    """
    shape = tuple(pixels.shape[1:])

    def uniform(shape: tuple[int, ...], purpose: str) -> Tensor:
        return rng.uniform(shape, seed=seed, purpose=purpose, index=index, epoch=epoch)

    if model.noise == "uniform":
        return dequantise(pixels, uniform(shape, purpose)), None
    drawn = None
    if model.sigma_range is not None:
        u = uniform((), f"{purpose} level")
        drawn = noise_levels(levels, model.sigma_range, u).float()
    sigma = model.sigma if drawn is None else drawn
    assert sigma is not None
    normal = rng.normal(shape, seed=seed, purpose=purpose, index=index, epoch=epoch)
    return add_gaussian(pixels, normal, sigma), drawn
