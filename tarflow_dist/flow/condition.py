"""What a block is conditioned on: the class, and an iTARFlow's noise level. Their embeddings are
added to every token."""

import math

import torch
from torch import Tensor, nn

from tarflow_dist.flow.transformer import accurate_dtype

EMBEDDING_STD = 1e-2
"""That embeddings start with."""
LOWEST_FREQUENCY = 1e-4


def condition(
    class_embed: Tensor | None,
    noise_embed: "NoiseLevelEmbedding | None",
    y: Tensor | None,
    sigma: Tensor | None,
) -> Tensor | None:
    """What is added to every token.

    Args:
        class_embed: (num_classes, 1, width), or None for an unconditional model.
        noise_embed: None for a model that isn't told the noise level.
        y: (B,) int64 class ids, −1 for none; None drops all.
        sigma: (B,) noise levels, where there is `noise_embed`.

    Returns:
        (B, 1, width), or (1, width) if it is the same for all; None for a model of neither.
    """
    classes = None if class_embed is None else _class_vector(class_embed, y)
    if noise_embed is None:
        return classes
    assert sigma is not None
    levels = noise_embed(sigma)[:, None]
    return levels if classes is None else classes + levels


def new_class_embed(num_classes: int, width: int) -> nn.Parameter | None:
    """(num_classes, 1, width); None without classes."""
    if not num_classes:
        return None
    return nn.Parameter(torch.randn(num_classes, 1, width) * EMBEDDING_STD)


def _class_vector(class_embed: Tensor, y: Tensor | None) -> Tensor:
    """(B, 1, width), or (1, width) where no sample has a label: the mean of all classes stands for
    none."""
    no_class = class_embed.mean(dim=0)
    if y is None:
        return no_class
    return torch.where((y < 0)[:, None, None], no_class, class_embed[y.clamp(min=0)])


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
