"""CUDA graphs: a GPU repeats what it was shown once, without Python launching each kernel."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

CACHE_LENGTHS = 8


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


class Replay:
    """Calls `work(stop)`, with `stop` up to `last`, as CUDA graphs.

    `stop` is rounded up to the end of one of `CACHE_LENGTHS` equal parts, with a graph each.

    Args:
        work: must find its tensors where they were, and copy nothing to the host.
        changes: what it changes and depends on.
    """

    def __init__(self, work: Callable[[int], None], changes: Sequence[Tensor], last: int):
        self._work, self._changes, self._last = work, changes, last
        self._stretch = -(-last // CACHE_LENGTHS)
        self._graphs: dict[int, Callable[[], None]] = {}

    def __call__(self, stop: int) -> None:
        end = min(-(-stop // self._stretch) * self._stretch, self._last)
        if end not in self._graphs:
            self._graphs[end] = record(partial(self._work, end), self._changes)
        self._graphs[end]()


def record(work: Callable[[], None], changes: Sequence[Tensor]) -> Callable[[], None]:
    """`work` as a graph; it has not been done when this returns."""
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
