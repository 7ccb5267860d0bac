"""How likely a model finds images that it was not trained on."""

from collections.abc import Iterable

import torch

from tarflow_dist import rng
from tarflow_dist.data.loader import Batch
from tarflow_dist.distributed import sum_over_ranks
from tarflow_dist.flow.model import Flow
from tarflow_dist.flow.noise import add_gaussian, dequantise
from tarflow_dist.flow.noise_level import noise_levels


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
        shape = tuple(pixels.shape[1:])
        for draw in range(draws):
            sigma = None
            if flow.sigma_range is not None:
                u = rng.uniform(
                    (), seed=seed, purpose="held-out noise level", index=index, epoch=draw
                )
                sigma = noise_levels("uniform", flow.sigma_range, u)
            if flow.noise == "gaussian":
                noise = rng.normal(shape, seed=seed, purpose="held out", index=index, epoch=draw)
                level = flow.sigma if sigma is None else sigma
                assert level is not None
                x = add_gaussian(pixels, noise, level)
            else:
                noise = rng.uniform(shape, seed=seed, purpose="held out", index=index, epoch=draw)
                x = dequantise(pixels, noise)
            total += flow.log_prob(x, labels, sigma).double().sum()
            count += len(pixels)
    sum_over_ranks(total)
    sum_over_ranks(count)
    return float(total / count) / flow.num_dims
