"""A block's transformer with a KV cache: patches go in a few at a time."""

from typing import Protocol

import torch
from torch import Tensor

from tarflow_dist.flow import native
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.transformer import TransformerLayer


class CachedTransformer(Protocol):
    """A block's transformer that has seen the first patches of some sequences."""

    def __call__(self, x: Tensor, at: int | Tensor, stop: int) -> Tensor:
        """The next patches (B, S, D) → the output projection (B, S, 2D); D, if volume-preserving.

        Args:
            at: where the patches stand: the place of a single one (S = 1); or (B, S), each
                sequence's own, never descending. Each sees the patches up to itself, as they were
                given last.
            stop: above all of `at`.
        """


def cached_transformer(
    block: FlowBlock, condition: Tensor | None, rows: int, temperature: Tensor | None
) -> CachedTransformer:
    """For `rows` sequences under the `condition` that `FlowBlock.condition` gives; `temperature`
    (rows, 1, 1, 1) divides their attention logits."""
    kind = native.NativeTransformer if native.can_run(block) else TorchTransformer
    return kind(block, condition, rows, temperature)


def cache_shape(block: FlowBlock, rows: int) -> torch.Size:
    """Of the keys and values of `rows` sequences: (layers, 2, rows, heads, N, head_dim)."""
    num_patches, width = block.pos_embed.shape
    heads = width // block.head_dim
    return torch.Size((len(block.attn_blocks), 2, rows, heads, num_patches, block.head_dim))


class TorchTransformer:
    """On every device, in every type.

    Args:
        caches: of `cache_shape`, finite; None takes memory of its own.
    """

    def __init__(
        self,
        block: FlowBlock,
        condition: Tensor | None,
        rows: int,
        temperature: Tensor | None,
        *,
        caches: Tensor | None = None,
    ):
        self._block = block
        self._condition = condition
        self._temperature = temperature
        if caches is None:
            caches = block.pos_embed.new_zeros(cache_shape(block, rows))
        self._caches = caches

    def __call__(self, x: Tensor, at: int | Tensor, stop: int) -> Tensor:
        mask = None
        if isinstance(at, Tensor):
            mask = torch.arange(stop, device=x.device) <= at[:, None, :, None]
        h = self._block.embed(x, self._block.positions_at(at), self._condition)
        for layer, cache in zip(self._block.attn_blocks, self._caches, strict=True):
            assert isinstance(layer, TransformerLayer)
            h = layer.extend(h, cache, at, stop, mask, self._temperature)
        return self._block.proj_out(h)
