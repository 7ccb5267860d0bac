"""Samples that are lost, not finite or run away, are drawn again."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_dist.errors import UserError
from tarflow_dist.flow.config import Noise
from tarflow_dist.flow.noise import to_pixels

ATTEMPTS = 5
"""To draw a sample that is finite and in range."""
RUNAWAY = 100.0
"""No image value, of pixels in [-1, 1], is that far from 0 unless the sample ran away."""


class Draws(NamedTuple):
    """A batch of samples."""

    images: Tensor
    """uint8 (B, H, W, C)."""
    again: Tensor
    """(B,) bool: was not finite or ran away at first."""


def draw_until_finite(draw: Callable[..., Tensor], index: Tensor, noise: Noise) -> Draws:
    """The samples `index` (B,). `draw` takes the attempt that each of them is at and gives all of
    them, (B, C, H, W), in a batch of one shape: a sample doesn't depend on which others are lost.

    Raises:
        UserError: some are lost in each of ATTEMPTS.
    """
    lost = torch.ones(len(index), dtype=torch.bool)
    images, again = None, ~lost
    for attempt in range(ATTEMPTS):
        x = draw(*(lost * attempt).tolist())
        if images is None:
            images = x
        else:
            again |= lost
            images = torch.where(lost.to(x.device)[:, None, None, None], x, images)
        lost = lost & ~(x.abs() < RUNAWAY).flatten(1).all(dim=1).cpu()
        if not lost.any():
            return Draws(to_pixels(images, noise).permute(0, 2, 3, 1), again)
    bad = index[lost].tolist()
    named = f"{bad[:5]} and {len(bad) - 5} more" if len(bad) > 5 else bad
    raise UserError(
        f"samples {named} are not finite or ran away in {ATTEMPTS} attempts: train longer, "
        "or lower the guidance if there is one"
    )
