"""Tweedie's one-step denoising through the forward flow."""

from collections.abc import Callable

import torch
from torch import Tensor


def score_denoise(
    unit_prior_log_prob: Callable[[Tensor], Tensor], x: Tensor, sigma: float
) -> Tensor:
    """x + σ²·∇ log p(x), for samples of a flow trained with Gaussian noise of std σ
    (arXiv 2412.06329, equation 8).

    Args:
        unit_prior_log_prob: (B, C, H, W) → (B,) nats, up to a constant.
        x: (B, C, H, W).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(unit_prior_log_prob(x).sum(), x)
    return x.detach() + sigma**2 * score
