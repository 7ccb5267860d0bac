"""The noise level as a condition of the transformers, which makes a TARFlow an iTARFlow."""

import math

import torch
from torch import Tensor, nn

from tarflow_dist.flow.transformer import accurate_dtype

LOWEST_FREQUENCY = 1e-4


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
