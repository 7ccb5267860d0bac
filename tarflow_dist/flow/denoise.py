"""Tweedie's one-step denoising through the forward flow."""

from collections.abc import Callable

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
    for start in range(0, max(len(x), 1), batch):  # no images are one part
        part = x[start : start + batch].detach().requires_grad_()
        labels = None if y is None else y[start : start + batch]
        with torch.enable_grad():
            log_prob = unit_prior_log_prob(part, labels).sum()
        scores += torch.autograd.grad(log_prob, part)
    return x.detach() + sigma**2 * torch.cat(scores)
