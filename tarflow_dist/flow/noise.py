"""Pixels k ∈ 0…255 to the model's range and back: two maps, one for each kind of training noise.

Gaussian noise (generation) is added to x = k/127.5 − 1; uniform noise (likelihood) fills the 8-bit
bins, x = (k + u)/128 − 1 with u in [0, 1). An iTARFlow's noise level is drawn, too. Random numbers
are the caller's.
"""

import torch
from torch import Tensor

from tarflow_dist.flow.config import Noise, NoiseLevels

LOG_MEAN, LOG_STD = -1.2, 1.0
"""Of the log-normal noise levels."""
HALF_A_STEP = 2.0**-33
"""Between two numbers of rng.uniform."""


def scale_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels → k/127.5 − 1 in [−1, 1], the map of Gaussian-noise models."""
    return pixels.to(dtype) / 127.5 - 1


def add_gaussian(pixels: Tensor, normal: Tensor, sigma: float | Tensor) -> Tensor:
    """uint8 pixels and standard normal numbers, both (B, C, H, W) → k/127.5 − 1 + σ·normal; σ is
    that of all images, or of each, (B,)."""
    if isinstance(sigma, Tensor):
        sigma = sigma[:, None, None, None]
    return scale_pixels(pixels, normal.dtype) + sigma * normal


def dequantise(pixels: Tensor, uniform: Tensor) -> Tensor:
    """uint8 pixels and numbers in [0, 1) of one shape → (k + u)/128 − 1 in [−1, 1)."""
    return (pixels.to(uniform.dtype) + uniform) / 128 - 1


def to_pixels(images: Tensor, noise: Noise) -> Tensor:
    """The model's range → uint8: the nearest pixel of the Gaussian map, or the bin that holds x."""
    levels = ((images + 1) * 127.5).round() if noise == "gaussian" else ((images + 1) * 128).floor()
    return levels.clamp(0, 255).to(torch.uint8)


def noise_levels(rule: NoiseLevels, sigma_range: tuple[float, float], uniform: Tensor) -> Tensor:
    """The noise levels, shaped like `uniform`, that numbers of rng.uniform stand for: uniform in
    `sigma_range`, with a uniform square in it, or log-normal whatever the range."""
    least, largest = sigma_range
    if rule == "lognormal":
        return (LOG_MEAN + LOG_STD * torch.special.ndtri(uniform + HALF_A_STEP)).exp()
    if rule == "uniform":
        return least + (largest - least) * uniform
    return (least**2 + (largest**2 - least**2) * uniform).sqrt()
