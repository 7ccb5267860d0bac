"""A block's transformer layers with a KV cache: tokens go in a few at a time."""

from typing import Protocol

import torch
from torch import Tensor

from tarflow_dist.flow import native
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.transformer import TransformerLayer


class CachedLayers(Protocol):
    """Layers that have seen the first tokens of some sequences."""

    def __call__(self, h: Tensor, at: int | Tensor, stop: int) -> Tensor:
        """The next tokens through all layers: (B, S, width) → (B, S, width).

        Args:
            h: the layers' input, which may be overwritten.
            at: where the tokens stand: the place of a single one (S = 1), or (B, S), each
                sequence's own, never descending. Each sees the tokens up to itself, as they were
                given last.
            stop: above all of `at`.
        """

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the sequences: (B,) bool."""


def cached_layers(block: FlowBlock, rows: int, temperature: Tensor | None) -> CachedLayers:
    """For `rows` sequences; `temperature` (rows, 1, 1, 1) divides their attention logits."""
    kind = native.NativeLayers if native.can_run(block) else TorchLayers
    return kind(block, rows, temperature)


class TorchLayers:
    """On every device, in every type."""

    def __init__(self, block: FlowBlock, rows: int, temperature: Tensor | None):
        self._layers = list(block.attn_blocks)
        self._caches = block.new_caches(rows)
        self._temperature = temperature

    def __call__(self, h: Tensor, at: int | Tensor, stop: int) -> Tensor:
        mask = None
        if isinstance(at, Tensor):
            mask = torch.arange(stop, device=h.device) <= at[:, None, :, None]
        for layer, cache in zip(self._layers, self._caches, strict=True):
            assert isinstance(layer, TransformerLayer)
            h = layer.extend(h, cache, at, stop, mask, self._temperature)
        return h

    def keep(self, rows: Tensor) -> None:
        for cache in self._caches:
            cache.memory = cache.memory[:, rows]
        if self._temperature is not None:
            self._temperature = self._temperature[rows]
