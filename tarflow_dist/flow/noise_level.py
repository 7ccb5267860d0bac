"""The noise level as a condition of the transformers, which makes a TARFlow an iTARFlow."""

import math

import torch
from torch import Tensor, nn

from tarflow_dist.flow.config import NoiseLevels
from tarflow_dist.flow.transformer import accurate_dtype

LOWEST_FREQUENCY = 1e-4
LOG_MEAN, LOG_STD = -1.2, 1.0
"""Of the log-normal noise levels."""
HALF_A_STEP = 2.0**-33
"""Between two numbers of rng.uniform."""


def noise_levels(rule: NoiseLevels, sigma_range: tuple[float, float], uniform: Tensor) -> Tensor:
    """The noise levels, shaped like `uniform`, that numbers of rng.uniform stand for: uniform in
    `sigma_range`, with a uniform square in it, or log-normal whatever the range."""
    least, largest = sigma_range
    if rule == "lognormal":
        return (LOG_MEAN + LOG_STD * torch.special.ndtri(uniform + HALF_A_STEP)).exp()
    if rule == "uniform":
        return least + (largest - least) * uniform
    return (least**2 + (largest**2 - least**2) * uniform).sqrt()


class NoiseLevelEmbedding(nn.Module):
    """σ → W₂·GELU(W₁·φ(ln σ) + b₁) + b₂, where φ are sines and cosines of falling frequencies.

    Args:
        width: channels of the transformer, an even number.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        """(B,) → (B, width)."""
        parameter = next(self.parameters())
        sigma = sigma.to(parameter.device, accurate_dtype(parameter.dtype))
        half = self.width // 2
        exponents = torch.arange(half, dtype=sigma.dtype, device=sigma.device)
        frequencies = torch.exp(math.log(LOWEST_FREQUENCY) / half * exponents)
        phase = sigma.log()[:, None] * frequencies
        return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1).to(parameter.dtype))
