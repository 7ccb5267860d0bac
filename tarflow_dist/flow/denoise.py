"""Tweedie's one-step denoising through the forward flow."""

from collections.abc import Callable
from itertools import repeat

import torch
from torch import Tensor

# (B, C, H, W) and labels (B,) or None → (B,) nats, up to a constant
LogProb = Callable[[Tensor, Tensor | None], Tensor]


def score_denoise(
    unit_prior_log_prob: LogProb, x: Tensor, y: Tensor | None, sigma: float, *, batch: int
) -> Tensor:
    """x + σ²·∇ log p(x | y), for samples of a flow trained with Gaussian noise of std σ
    (arXiv 2412.06329, equation 8).

    Args:
        x: (B, C, H, W).
        y: (B,), or None.
        batch: images taken at once, which bounds the memory.
    """
    scores: list[Tensor] = []
    labels = repeat(None) if y is None else y.split(batch)
    for part, part_labels in zip(x.detach().split(batch), labels, strict=False):
        part.requires_grad_()
        with torch.enable_grad():
            log_prob = unit_prior_log_prob(part, part_labels).sum()
        scores += torch.autograd.grad(log_prob, part)
    return x.detach() + sigma**2 * torch.cat(scores)
