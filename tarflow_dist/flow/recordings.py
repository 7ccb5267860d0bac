"""The sequential inverse on a GPU: CUDA graphs of a few patches each, recorded once for a model and
a size of batch, and replayed for all that is drawn after."""

from functools import partial

import torch
from torch import Tensor

from tarflow_dist.flow import cuda_graphs
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.kv_cache import TritonTransformer
from tarflow_dist.flow.predictor import Predictor

PATCHES = 16
"""Of a graph: so many that launching it costs little beside it."""


class Recordings:
    """What one model has recorded, and the KV cache that its blocks share.

    A copy of the model begins without: a graph holds addresses.
    """

    def __init__(self) -> None:
        self._of: dict[FlowBlock, _Recording] = {}
        self._memory = torch.empty(0)

    def __reduce__(self) -> tuple[type["Recordings"], tuple]:
        return Recordings, ()

    def invert(
        self, block: FlowBlock, z: Tensor, condition: Tensor | None, guidance: Guidance
    ) -> Tensor:
        """Latents (B, N, D) in the block's own order → data, exactly. `condition` is that of
        `flow.predictor.guided_condition`."""
        if z.shape[1] == 1:
            return z.clone()
        key = _key(block, z, condition, guidance)
        with torch.inference_mode(False), torch.no_grad():  # it shall serve in either mode
            if block not in self._of or self._of[block].key != key:
                self._of.pop(block, None)  # its memory first
                caches = self._caches(block, len(z) * (2 if guidance.active else 1))
                self._of[block] = _Recording(key, block, z, condition, guidance, caches)
            return self._of[block](z, condition)

    def _caches(self, block: FlowBlock, rows: int) -> Tensor:
        """(layers, 2, rows, heads, N, head_dim), in the memory of all blocks' caches."""
        num_patches, width = block.pos_embed.shape
        shape = (rows, width // block.head_dim, num_patches, block.head_dim)
        needed = (len(block.attn_blocks), 2, *shape)
        like = block.pos_embed
        size = torch.Size(needed).numel()
        memory = self._memory
        if memory.dtype != like.dtype or memory.device != like.device or len(memory) < size:
            self._of.clear()
            self._memory = memory = torch.empty(0)  # gone before the new one comes
            self._memory = memory = like.new_empty(size)
        return memory[:size].view(needed)


class _Recording:
    """One block's, for latents, a condition and a guidance of one kind: `key`."""

    def __init__(
        self,
        key: tuple,
        block: FlowBlock,
        z: Tensor,
        condition: Tensor | None,
        guidance: Guidance,
        caches: Tensor,
    ):
        self.key = key
        self._z, self._x = z.clone(), z.clone()
        self._condition = None if condition is None else condition.clone()
        self._place = torch.zeros(1, dtype=torch.int64, device=z.device)
        self._predict = Predictor(
            block, self._condition, len(z), guidance, partial(TritonTransformer, caches=caches)
        )
        self._patches = min(PATCHES, z.shape[1] - 1)
        self._play = cuda_graphs.record(self._next_patches, (self._x, self._place))

    def __call__(self, z: Tensor, condition: Tensor | None) -> Tensor:
        self._z.copy_(z)
        self._x.copy_(z)
        self._place.zero_()
        if self._condition is not None:
            assert condition is not None
            self._condition.copy_(condition)
        for _ in range(-(-(z.shape[1] - 1) // self._patches)):
            self._play()
        return self._x.clone()

    def _next_patches(self) -> None:
        """Beyond the end the last patch is solved again, to the same values."""
        last = self._x.shape[1] - 1
        for _ in range(self._patches):
            after = self._place + 1
            mu, scale = self._predict(self._x.index_select(1, self._place), self._place, last)
            new = torch.addcmul(mu, self._z.index_select(1, after), scale)
            self._x.index_copy_(1, after, new)
            self._place.copy_(after.clamp(max=last - 1))


def _key(block: FlowBlock, z: Tensor, condition: Tensor | None, guidance: Guidance) -> tuple:
    """What a recording depends on but for the values in it."""
    shapes = [None if given is None else (given.shape, given.dtype) for given in (z, condition)]
    weights = [(weight.data_ptr(), weight.dtype) for weight in block.parameters()]
    return guidance, *shapes, *weights
