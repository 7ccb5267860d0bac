"""Removing the training noise from samples, along the flow's own score."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
        order: 1, as published, or 2, which is as near to the limit of many steps with a third of
            them; see `denoise_in_steps`.

    Raises:
        ValueError: steps or an order that there can't be.
    """

    steps: int | None = None
    clip: bool = False
    stochastic: bool = False
    order: int = 1

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but must be 1 or more")
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order}, but must be 1 or 2")
        if self.stochastic and self.order == 2:
            raise ValueError("stochastic steps are of order 1: leave order or stochastic out")

    def arguments(self) -> dict[str, Any]:
        """Those of `TarFlow.sample`."""
        return {f"denoise_{name}": value for name, value in asdict(self).items()}

    def levels(self, least: float, largest: float, steps: int) -> list[float]:
        """The noise levels that steps start from: falling, and evenly spaced for order 1, as
        published; evenly in √σ for order 2, which halves its error."""
        root = 1 / self.order
        ends = largest**root, least**root
        even = torch.linspace(*ends, self.steps or steps, dtype=torch.float64)
        return (even**self.order).tolist()


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
    order: int = 1,
    normal: Callable[[int], Tensor] | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Iterative denoising (iTARFlow): from each noise level to the next on the line that leads to
    the score step's answer x̂, which is the last level's result.

    These are Euler's steps along dx/dσ = (x − x̂)/σ, exact where x̂ is the same at all levels. Those
    of order 2 take it as linear in σ, through the answers at this level and the one before.

    Args:
        score_step: x (B, C, H, W) and its σ → x + σ²·∇ log p(x | y, σ).
        x: of the first level.
        levels: falling, above 0.
        clip: keep the score step's answers in [−1, 1].
        order: 1 or 2, which the stochastic rule has no use for.
        normal: step → standard normal numbers like x, for the stochastic rule; None for the
            deterministic one.
        on_step: called after each step, with the images at the next level.
    """
    previous: tuple[Tensor, float] | None = None
    for step, (sigma, lower) in enumerate(pairwise([*levels, 0.0])):
        clean = score_step(x, sigma)
        if clip:
            clean = clean.clamp(-1, 1)
        direction = (x - clean) / sigma
        if normal is not None and lower > 0:
            kept = (lower / sigma) ** 2
            direction = kept**0.5 * direction + (1 - kept) ** 0.5 * normal(step)
        x = clean + lower * direction
        if order == 2 and previous is not None and lower > 0:
            slope = (clean - previous[0]) / (sigma - previous[1])
            x = x + (lower * math.log(sigma / lower) - (sigma - lower)) * slope
        previous = clean, sigma
        if on_step is not None:
            on_step(x)
    return x
