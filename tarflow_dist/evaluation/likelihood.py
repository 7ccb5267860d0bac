"""How likely a model finds images that it was not trained on."""

import math
from collections.abc import Iterable

import torch

from tarflow_dist import rng
from tarflow_dist.data.loader import Batch
from tarflow_dist.distributed import sum_over_ranks
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.noise import add_gaussian, dequantise

# log2 128: an 8-bit bin is 1/128 wide in x = (k + u)/128 − 1
BIN_BITS = 7


@torch.no_grad()
def mean_log_prob(flow: Flow, batches: Iterable[Batch], *, draws: int, seed: int) -> float:
    """log p(x | y) in nats a dimension under the model's own training noise: the mean over all
    ranks' images and over `draws` of the noise. Draw d of image i is the same on any rank."""
    total = torch.zeros((), dtype=torch.float64, device=flow.device)
    count = torch.zeros_like(total)
    for batch in batches:
        pixels, index = batch.images.to(flow.device), batch.index.to(flow.device)
        labels = batch.labels.to(flow.device) if flow.num_classes else None
        shape = tuple(pixels.shape[1:])
        for draw in range(draws):
            if flow.sigma is not None:
                noise = rng.normal(shape, seed=seed, purpose="held out", index=index, epoch=draw)
                x = add_gaussian(pixels, noise, flow.sigma)
            else:
                noise = rng.uniform(shape, seed=seed, purpose="held out", index=index, epoch=draw)
                x = dequantise(pixels, noise)
            total += flow.log_prob(x, labels).double().sum()
            count += len(pixels)
    sum_over_ranks(total)
    sum_over_ranks(count)
    return float(total / count) / flow.num_dims


def loss_of(log_prob: float) -> float:
    """The training loss 0.5·mean(z²) + Σ_t mean(αᵗ) that goes with a log-likelihood in nats a
    dimension: its negative, without the constant 0.5·log 2π."""
    return -log_prob - 0.5 * math.log(2 * math.pi)


def bits_per_dim(log_prob: float) -> float:
    """Bits a dimension of 8-bit images, from the log-likelihood of a uniform-noise model in nats a
    dimension: −log p(x)/ln 2 + 7."""
    return -log_prob / math.log(2) + BIN_BITS
