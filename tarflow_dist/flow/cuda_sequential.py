"""The sequential inverse on a GPU, as a graph records it: one patch after another.

Launching kernels of so few values costs more than what they do. What doesn't wait for the patch
before is therefore done for all patches of a graph at once; each then takes 8 kernels a layer, 4
besides, and one more a layer where few sequences share out their keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.predictor import attention_temperature
from tarflow_dist.flow.transformer import TransformerLayer, accurate_dtype

PATCHES = 16
"""Of a graph: so many that launching it costs little beside it."""


class PatchByPatch:
    """x_i = z_i · exp(α_i(x_<i)) + μ_i(x_<i) over a batch of sequences.

    Args:
        condition: that `flow.predictor.guided_condition` gives.
        caches: of `flow.kv_cache.cache_shape`, contiguous; its values need not be any.
        z: latents (B, N, D) in the block's own order.
        x: like z: the answer.
    """

    def __init__(
        self,
        block: FlowBlock,
        condition: Tensor | None,
        guidance: Guidance,
        caches: Tensor,
        z: Tensor,
        x: Tensor,
    ):
        self._block, self._guidance, self._caches = block, guidance, caches
        self._z, self._x = z.transpose(0, 1), x.transpose(0, 1)
        num_patches, rows, width = len(self._z), caches.shape[2], block.pos_embed.shape[1]
        self._passes = rows // len(z)
        if condition is None:
            condition = caches.new_zeros(1, width)
        self._condition = condition.view(-1, width).expand(rows, width)
        accurate = accurate_dtype(caches.dtype)
        self._logit_scale = caches.new_full((rows,), block.head_dim**-0.5, dtype=accurate)
        temperature = attention_temperature(block, len(z), guidance)
        if temperature is not None:
            self._logit_scale /= temperature.flatten()
        places = torch.arange(num_patches, device=z.device)
        weights = guidance.weight_at(places.to(z.dtype), num_patches)
        self._weights = z.new_ones(num_patches) * weights
        self._steps = places[: min(PATCHES, num_patches - 1)]
        self._start = torch.zeros_like(places[:1])

    def solve(self, step: Callable[[], None]) -> None:
        """From the first patch, which is as it is, to the last, by calls of `step` or what replays
        it. The last call begins early enough to end there, and solves some patches again, to the
        same values."""
        self._x.copy_(self._z)
        last = len(self._z) - 1
        for start in range(0, last, len(self._steps)):
            self._start.fill_(min(start, last - len(self._steps)))
            step()

    def step(self) -> None:
        """The patches after `start`."""
        from tarflow_dist.flow.triton_kernels import solve_patch

        places = self._start + self._steps
        after = places + 1
        z, weights = self._z.index_select(0, after), self._weights.index_select(0, after)
        # what `FlowBlock.embed` adds to the projection: (patches, rows, width)
        added = self._block.positions_at(places)[:, None] + self._condition
        before = self._x.index_select(0, self._start).to(added.dtype)
        token = before.transpose(0, 1).repeat(self._passes, 1, 1)
        solved = []
        for i in range(len(self._steps)):
            out = self._predict(token, added[i, :, None], places[i : i + 1])
            how = (weights[i : i + 1], self._guidance.rule, self._guidance.guide)
            x, token = solve_patch(out, z[i], *how)
            solved.append(x)
        self._x.index_copy_(0, after, torch.stack(solved))

    def _predict(self, token: Tensor, added: Tensor, place: Tensor) -> Tensor:
        """The patch (rows, 1, D) at `place` (1,) → the output projection (rows, 1, 2D)."""
        from tarflow_dist.flow.triton_kernels import add_norm, attend

        h, change = added, self._block.proj_in(token)
        for layer, cache in zip(self._block.attn_blocks, self._caches, strict=True):
            assert isinstance(layer, TransformerLayer)
            attention, mlp = layer.attention, layer.mlp
            h, normed = add_norm(h, change, *_norm(attention.norm))
            out = attend(attention.qkv(normed), cache, place, self._logit_scale)
            h, normed = add_norm(h, attention.proj(out), *_norm(mlp.norm))
            change = mlp.main(normed)
        return self._block.proj_out(h + change)


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps
