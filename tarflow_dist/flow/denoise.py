"""Removing the training noise from samples, along the flow's own score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# (B, C, H, W) and labels (B,) or None → (B,) nats, up to a constant
LogProb = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Denoising:
    """How an iTARFlow's samples are denoised.

    Attributes:
        steps: from the largest noise level down; None is the model's own number.
        clip: keep what each step aims at in [−1, 1].
        stochastic: add new noise at each step.
    """

    steps: int | None = None
    clip: bool = False
    stochastic: bool = False

    def arguments(self) -> dict[str, Any]:
        """Those of `TarFlow.sample`."""
        return {
            "denoise_steps": self.steps,
            "denoise_clip": self.clip,
            "denoise_stochastic": self.stochastic,
        }


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


def denoise_in_steps(
    score_step: Callable[[Tensor, float], Tensor],
    x: Tensor,
    levels: Sequence[float],
    *,
    clip: bool,
    normal: Callable[[int], Tensor] | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Iterative denoising (iTARFlow): from each noise level to the next on the line that leads to
    the score step's answer, which is the last level's result.

    Args:
        score_step: x (B, C, H, W) and its σ → x + σ²·∇ log p(x | y, σ).
        x: of the first level.
        levels: falling, above 0.
        clip: keep the score step's answers in [−1, 1].
        normal: step → standard normal numbers like x, for the stochastic rule; None for the
            deterministic one.
        on_step: called after each step, with the images at the next level.
    """
    for step, (sigma, lower) in enumerate(pairwise([*levels, 0.0])):
        clean = score_step(x, sigma)
        if clip:
            clean = clean.clamp(-1, 1)
        direction = (x - clean) / sigma
        if normal is not None and lower > 0:
            kept = (lower / sigma) ** 2
            direction = kept**0.5 * direction + (1 - kept) ** 0.5 * normal(step)
        x = clean + lower * direction
        if on_step is not None:
            on_step(x)
    return x
