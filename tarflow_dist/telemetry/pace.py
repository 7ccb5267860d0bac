"""How fast a run is, and what it waits for."""

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tarflow_dist import distributed

GIB = 2**30


class Pace:
    """Measures this rank's time from one row of metrics to the next.

    Args:
        device: where the model computes.
        images: the run's position.
    """

    def __init__(self, device: torch.device, images: int):
        self._cuda = device.type == "cuda"
        self._waited = self._worked = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began, self._images = time.monotonic(), images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around forward passes: work that, below ZeRO 3, waits for no other rank, so that a slow
        one shows. On a GPU its own clock is read, and only at the next row."""
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = time.monotonic()
            yield
            self._worked += time.monotonic() - began

    def figures(self, images: int) -> dict[str, float]:
        """Since the last call, over all ranks:

        - images_per_second
        - data_wait: share of the time spent waiting for data, on the rank that waits most
        - slowest_rank, and slowest_rank_lag: by how much its forward passes take longer than the
          median's (0.1: a tenth)
        - memory_gib: peak of GPU memory, or of host memory where there is no GPU, on the rank
          with most

        Collective.
        """
        elapsed = time.monotonic() - self._began
        ranks = distributed.gather((self._waited / elapsed, self._work(), self._memory()))
        waits, works, memories = zip(*ranks, strict=True)
        figures = {
            "images_per_second": (images - self._images) / elapsed,
            "data_wait": max(waits),
            "slowest_rank": works.index(max(works)),
            "slowest_rank_lag": max(works) / statistics.median(works) - 1,
            "memory_gib": max(memories),
        }
        self._began, self._images, self._waited = time.monotonic(), images, 0.0
        return figures

    def _work(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
            self._worked = sum(a.elapsed_time(b) for a, b in self._events) / 1000
            self._events = []
        worked, self._worked = self._worked, 0.0
        return worked

    def _memory(self) -> float:
        if self._cuda:
            return torch.cuda.max_memory_allocated() / GIB
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
