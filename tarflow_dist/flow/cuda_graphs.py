"""The inverse on a GPU: CUDA graphs, recorded once for a model and a size of batch, and replayed
for all that is drawn after, without Python launching each kernel."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.cuda_sequential import PatchByPatch
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import Solver, Windows
from tarflow_dist.flow.kv_cache import TorchTransformer, cache_shape
from tarflow_dist.flow.predictor import Predictor

CACHE_LENGTHS = 8
"""That graphs of windows read."""


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


class GraphedInverse:
    """What one model has recorded, and the KV cache that its blocks share.

    A copy of the model begins without: a graph holds addresses.
    """

    def __init__(self) -> None:
        self._of: dict[FlowBlock, _Recording] = {}
        self._memory = torch.empty(0)

    def __reduce__(self) -> tuple[type["GraphedInverse"], tuple]:
        return GraphedInverse, ()

    def __call__(
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
        self._solve: Callable[[], None]
        if solver.window == 1:
            patches = PatchByPatch(block, self._condition, guidance, caches, self._z, self._x)
            self._solve = partial(patches.solve, record(patches.step, (self._x,)))
        else:
            kind = partial(TorchTransformer, caches=caches)
            predict = Predictor(block, self._condition, len(z), guidance, kind)
            self._solve = _Sweeps(Windows(predict, self._z, self._x, solver), caches).solve

    def __call__(self, z: Tensor, condition: Tensor | None) -> Tensor:
        self._z.copy_(z)
        if self._condition is not None:
            assert condition is not None
            self._condition.copy_(condition)
        self._solve()
        return self._x.clone()


class _Sweeps:
    """Those of `windows`: a graph for each of `CACHE_LENGTHS` lengths of what they read of the
    cache, recorded when it is first reached."""

    def __init__(self, windows: Windows, caches: Tensor):
        self._windows, self._caches = windows, caches
        self._graphs: dict[int, Callable[[], None]] = {}

    def solve(self) -> None:
        self._caches.zero_()  # what is there of others may not be finite
        self._windows.solve(self._sweep)

    def _sweep(self, stop: int) -> None:
        windows, last = self._windows, self._windows.x.shape[1] - 1
        part = -(-last // CACHE_LENGTHS)
        end = min(-(-stop // part) * part, last)
        if end not in self._graphs:
            changes = (windows.x, windows.settled)
            self._graphs[end] = record(partial(windows.sweep, end), changes)
        self._graphs[end]()


def record(work: Callable[[], None], changes: Sequence[Tensor]) -> Callable[[], None]:
    """`work` as a graph; it has not been done when this returns.

    Args:
        work: must find its tensors where they were, and copy nothing to the host.
        changes: what it changes and depends on.
    """
    with torch.cuda.device(changes[0].device):
        before = [tensor.clone() for tensor in changes]
        # what its libraries set up at their first call must not be recorded
        stream = _stream(changes[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, was in zip(changes, before, strict=True):
            tensor.copy_(was)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for each that it has met."""
    return torch.cuda.Stream(device)


def _key(
    block: FlowBlock, z: Tensor, condition: Tensor | None, guidance: Guidance, solver: Solver
) -> tuple:
    """What a recording depends on but for the values in it."""
    shapes = [None if given is None else (given.shape, given.dtype) for given in (z, condition)]
    weights = [(weight.data_ptr(), weight.dtype) for weight in block.parameters()]
    return guidance, solver, *shapes, *weights
