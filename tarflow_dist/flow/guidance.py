"""Classifier-free guidance of the inverse flow."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Guide = Literal["both", "mu", "alpha"]


@dataclass(frozen=True)
class Guidance:
    """How the conditional and the unguided prediction are combined (arXiv 2412.06329, section 3.4).

    Attributes:
        weight: w in (1 + w)·conditional − w·unguided; 0 leaves the unguided pass out.
        annealed: patch i (0-based, in the block's own order) uses w·i/(N − 1).
        guide: which of μ and α is guided.
        attn_temp: τ, divides the attention logits of the unguided pass. An unconditional model is
            guided through τ ≠ 1 alone.
    """

    weight: float = 0.0
    annealed: bool = False
    guide: Guide = "both"
    attn_temp: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"guidance is {self.weight}, but must be a number, 0 or more")
        if self.guide not in get_args(Guide):
            raise ValueError(f"guide is {self.guide!r}, but must be {', '.join(get_args(Guide))}")
        if not 0 < self.attn_temp < math.inf:
            raise ValueError(f"attn_temp is {self.attn_temp}, but must be a number above 0")
        if self.weight == 0 and self.attn_temp != 1:
            raise ValueError("attn_temp shapes the unguided pass: give a guidance above 0 with it")

    @property
    def active(self) -> bool:
        return self.weight > 0

    def check(self, *, conditional: bool, volume_preserving: bool) -> None:
        """Raises `ValueError` if guiding would do nothing: both passes are the same, or what is
        guided is always 0."""
        if self.active and self.guide == "alpha" and volume_preserving:
            raise ValueError("a volume-preserving model has no alpha to guide: guide mu or both")
        if self.active and not conditional and self.attn_temp == 1:
            raise ValueError(
                "guidance needs class labels, or for an unconditional model an attention "
                "temperature attn_temp other than 1"
            )

    def combine(
        self, mu: Tensor, alpha: Tensor, patch: int, num_patches: int
    ) -> tuple[Tensor, Tensor]:
        """μ and α of `patch` from (2B, 1, D): conditional half first, then unguided → (B, 1, D)."""
        w = self.weight * patch / (num_patches - 1) if self.annealed else self.weight
        (mu, mu_unguided), (alpha, alpha_unguided) = mu.chunk(2), alpha.chunk(2)
        if self.guide != "alpha":
            mu = (1 + w) * mu - w * mu_unguided
        if self.guide != "mu":
            alpha = (1 + w) * alpha - w * alpha_unguided
        return mu, alpha
