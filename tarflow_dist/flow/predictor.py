"""What a block predicts for patches one after another, under guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.kv_cache import CachedTransformer, cached_transformer
from tarflow_dist.flow.transformer import accurate_dtype


def guided_condition(
    block: FlowBlock, y: Tensor | None, sigma: Tensor | None, guidance: Guidance
) -> Tensor | None:
    """`FlowBlock.condition` of the conditional pass and then, if there is guidance, of the unguided
    one: class ids and noise levels (B,) → (B or 2B, 1, width), or as it says."""
    if guidance.active:
        y = None if y is None else torch.cat([y, torch.full_like(y, -1)])
        sigma = None if sigma is None else torch.cat([sigma, sigma])
    return block.condition(y, sigma)


def attention_temperature(block: FlowBlock, batch: int, guidance: Guidance) -> Tensor | None:
    """What divides the attention logits of `batch` samples, then of their unguided pass:
    (2B, 1, 1, 1), at least float32; None if it is 1."""
    if guidance.attn_temp == 1:
        return None
    weight = block.proj_out.weight
    temperature = weight.new_ones(2 * batch, 1, 1, 1, dtype=accurate_dtype(weight.dtype))
    temperature[batch:] = guidance.attn_temp
    return temperature


class Predictor:
    """μ and exp(α) of a block, guided, for patches whose predecessors it has been given before.

    The conditional and the unguided pass run as one batch of 2B.

    Args:
        condition: that `guided_condition` gives.
        batch: B.
        transformer: makes the transformer, as `cached_transformer` does.
    """

    def __init__(
        self,
        block: FlowBlock,
        condition: Tensor | None,
        batch: int,
        guidance: Guidance,
        transformer: Callable[..., CachedTransformer] = cached_transformer,
    ):
        self._block, self._guidance = block, guidance
        rows = 2 * batch if guidance.active else batch
        temperature = attention_temperature(block, batch, guidance)
        self._transformer = transformer(block, condition, rows, temperature)

    def __call__(self, x: Tensor, at: int | Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """The patches x (B, S, D) → μ and exp(α) (B, S, D) of those that come after each.

        Their keys and values are kept, for calls with later patches.

        Args:
            at: where they stand in the sequence: the place of a single patch (S = 1); or (B, S),
                each sample's own, never descending.
            stop: above all of `at`.
        """
        places = at
        if self._guidance.active:
            x = torch.cat([x, x])
            if isinstance(at, Tensor):
                places = torch.cat([at, at])
        mu, alpha = self._block.mu_alpha(self._transformer(x, places, stop))
        if not self._guidance.active:
            return mu, alpha.exp()
        return self._guidance.combine(mu, alpha, at + 1, len(self._block.pos_embed))
