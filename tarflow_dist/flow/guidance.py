"""Classifier-free guidance of the inverse flow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # a config can be checked without torch
    from torch import Tensor

Guide = Literal["both", "mu", "alpha"]
Rule = Literal["linear", "gaussian", "scale"]


@dataclass(frozen=True)
class Guidance:
    """How the conditional and the unguided prediction are combined.

    Attributes:
        weight: w ≥ 0; 0 leaves the unguided pass out, and nothing else may be set then.
        annealed: patch i (0-based, in the block's own order) uses w·i/(N − 1).
        guide: which of μ and α is guided.
        attn_temp: τ, divides the attention logits of the unguided pass. An unconditional model is
            guided through τ ≠ 1 alone.
        rule: "linear", (1 + w)·conditional − w·unguided for μ and α each (arXiv 2412.06329,
            section 3.4); "scale", the same for μ and exp(α) (iTARFlow), which may turn negative; or
            "gaussian", the density p_c^(1 + w)·p_u^(−w), which is Gaussian again, with the unguided
            precision held below the conditional one (STARFlow, arXiv 2506.06276).
        blocks: the flow blocks that are guided, numbered as in the forward pass; None for all. Kept
            in order, each once.
    """

    weight: float = 0.0
    annealed: bool = False
    guide: Guide = "both"
    attn_temp: float = 1.0
    rule: Rule = "linear"
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"guidance is {self.weight}, but must be a number, 0 or more")
        for name, value, kind in (("guide", self.guide, Guide), ("rule", self.rule, Rule)):
            if value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}, but must be {', '.join(get_args(kind))}")
        if not 0 < self.attn_temp < math.inf:
            raise ValueError(f"attn_temp is {self.attn_temp}, but must be a number above 0")
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))
        if self.weight == 0 and any(getattr(self, f.name) != f.default for f in fields(self)):
            raise ValueError(
                "annealed, guide, attn_temp, rule and guide_blocks say how to guide: give a "
                "guidance above 0 with them"
            )

    @property
    def active(self) -> bool:
        return self.weight > 0

    def arguments(self) -> dict[str, Any]:
        """This guidance as `Flow.decode` and `TarFlow.sample` take it, in JSON's types."""
        return {
            "guidance": self.weight,
            "annealed": self.annealed,
            "guide": self.guide,
            "attn_temp": self.attn_temp,
            "rule": self.rule,
            "guide_blocks": None if self.blocks is None else list(self.blocks),
        }

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

    def per_block(self, num_blocks: int) -> list["Guidance"]:
        """The guidance of each flow block: this one, or none.

        Raises:
            ValueError: one of `blocks` isn't there.
        """
        blocks = range(num_blocks) if self.blocks is None else self.blocks
        if not set(blocks) <= set(range(num_blocks)):
            raise ValueError(
                f"guide_blocks {list(blocks)} should be among the model's blocks, "
                f"0 to {num_blocks - 1}"
            )
        return [self if t in blocks else Guidance() for t in range(num_blocks)]

    def weight_at(self, patch: "float | Tensor", num_patches: int) -> "float | Tensor":
        """w of this patch, or of these, of a sequence."""
        return self.weight * patch / (num_patches - 1) if self.annealed else self.weight

    def combine(
        self, mu: "Tensor", alpha: "Tensor", patch: "int | Tensor", num_patches: int
    ) -> tuple["Tensor", "Tensor"]:
        """μ and α (2B, S, D), first the conditional, then the unguided half → μ and exp(α), guided,
        (B, S, D). `patch` says which ones of the sequence they are of: one, or (B, S)."""
        place = patch if isinstance(patch, int) else patch.to(mu.dtype)[..., None]
        w = self.weight_at(place, num_patches)
        (mu, mu_unguided), (alpha, alpha_unguided) = mu.chunk(2), alpha.chunk(2)
        if self.rule == "gaussian":
            ws = w * (2 * (alpha - alpha_unguided).clamp(max=0)).exp()
            precision = 1 + w - ws  # of the guided density, in units of the conditional one's
            guided_mu = ((1 + w) * mu - ws * mu_unguided) / precision
            guided_scale = (alpha - 0.5 * precision.log()).exp()
        else:
            guided_mu = mu_unguided.lerp(mu, 1 + w)
            if self.rule == "linear":
                guided_scale = alpha_unguided.lerp(alpha, 1 + w).exp()
            else:
                guided_scale = alpha_unguided.exp().lerp(alpha.exp(), 1 + w)
        return (
            guided_mu if self.guide != "alpha" else mu,
            guided_scale if self.guide != "mu" else alpha.exp(),
        )
