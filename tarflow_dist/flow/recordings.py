"""The inverse on a GPU: CUDA graphs, recorded once for a model and a size of batch, and replayed
for all that is drawn after."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tarflow_dist.flow import cuda_graphs
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.kv_cache import TorchTransformer, TritonTransformer, cache_shape
from tarflow_dist.flow.predictor import Predictor
from tarflow_dist.flow.windows import Solver, Windows

PATCHES = 16
"""Of a sequential graph: so many that launching it costs little beside it."""


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
        self,
        block: FlowBlock,
        z: Tensor,
        condition: Tensor | None,
        guidance: Guidance,
        solver: Solver,
    ) -> Tensor:
        """Latents (B, N, D) in the block's own order → data. `condition` is that of
        `flow.predictor.guided_condition`."""
        key = _key(block, z, condition, guidance, solver)
        with torch.inference_mode(False), torch.no_grad():  # it shall serve in either mode
            if block not in self._of or self._of[block].key != key:
                self._of.pop(block, None)  # its memory first
                caches = self._caches(block, len(z) * (2 if guidance.active else 1))
                self._of[block] = _Recording(key, block, z, condition, guidance, solver, caches)
            return self._of[block](z, condition)

    def _caches(self, block: FlowBlock, rows: int) -> Tensor:
        """Of `cache_shape`, in the memory of all blocks' caches."""
        shape, like, memory = cache_shape(block, rows), block.pos_embed, self._memory
        size = shape.numel()
        if memory.dtype != like.dtype or memory.device != like.device or len(memory) < size:
            self._of.clear()
            self._memory = memory = torch.empty(0)  # gone before the new one comes
            self._memory = memory = like.new_empty(size)
        return memory[:size].view(shape)


class _Recording:
    """One block's, for latents, a condition, a guidance and a solver of one kind: `key`."""

    def __init__(
        self,
        key: tuple,
        block: FlowBlock,
        z: Tensor,
        condition: Tensor | None,
        guidance: Guidance,
        solver: Solver,
        caches: Tensor,
    ):
        self.key = key
        self._z, self._x = z.clone(), z.clone()
        self._condition = None if condition is None else condition.clone()
        kind = TritonTransformer if solver.window == 1 else TorchTransformer
        predict = Predictor(block, self._condition, len(z), guidance, partial(kind, caches=caches))
        self._solve: Callable[[], None]
        if solver.window == 1:
            self._solve = _Sequence(predict, self._z, self._x).solve
        else:
            windows = Windows(predict, self._z, self._x, solver)
            self._solve = _Sweeps(windows, caches, z.shape[1] - 1).solve

    def __call__(self, z: Tensor, condition: Tensor | None) -> Tensor:
        self._z.copy_(z)
        if self._condition is not None:
            assert condition is not None
            self._condition.copy_(condition)
        self._solve()
        return self._x.clone()


class _Sequence:
    """One patch after another: x (B, N, D) from the latents z, in graphs of `PATCHES` patches."""

    def __init__(self, predict: Predictor, z: Tensor, x: Tensor):
        self._predict, self._z, self._x = predict, z, x
        self._last = z.shape[1] - 1
        self._patches = min(PATCHES, self._last)
        self._place = torch.zeros(1, dtype=torch.int64, device=z.device)
        self._play = cuda_graphs.record(self._next_patches, (self._x, self._place))

    def solve(self) -> None:
        self._x.copy_(self._z)
        self._place.zero_()
        for _ in range(-(-self._last // self._patches)):
            self._play()

    def _next_patches(self) -> None:
        """Beyond the end the last patch is solved again, to the same values."""
        for _ in range(self._patches):
            after = self._place + 1
            mu, scale = self._predict(self._x.index_select(1, self._place), self._place, self._last)
            new = torch.addcmul(mu, self._z.index_select(1, after), scale)
            self._x.index_copy_(1, after, new)
            self._place.copy_(after.clamp(max=self._last - 1))


class _Sweeps:
    """`windows`, with a graph for each length of the cache that it reads."""

    def __init__(self, windows: Windows, caches: Tensor, last: int):
        self._windows, self._caches = windows, caches
        changes = (windows.x, windows.settled)
        self._sweep = cuda_graphs.Replay(windows.sweep, changes, last)

    def solve(self) -> None:
        self._caches.zero_()  # what is there of others may not be finite
        self._windows.solve(self._sweep)


def _key(
    block: FlowBlock, z: Tensor, condition: Tensor | None, guidance: Guidance, solver: Solver
) -> tuple:
    """What a recording depends on but for the values in it."""
    shapes = [None if given is None else (given.shape, given.dtype) for given in (z, condition)]
    weights = [(weight.data_ptr(), weight.dtype) for weight in block.parameters()]
    return guidance, solver, *shapes, *weights
