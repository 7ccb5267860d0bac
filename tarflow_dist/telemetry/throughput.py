"""How fast a run is, and what it waits for."""

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import find_card
from tarflow_dist.flow.flops import FlowCost

GIB = 2**30


class Throughput:
    """Measures this rank's time from one row of metrics to the next.

    Args:
        config: the run's.
        device: where the model computes.
        images: the run's position.
    """

    def __init__(self, config: Config, device: torch.device, images: int):
        self._cuda = device.type == "cuda"
        self._flops = FlowCost(config.model).training_flops
        card = find_card(distributed.device_name(device))
        self._peak = None if card is None else card.peak_flops(config.train.precision)
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
        """Around forward passes: work that, below ZeRO 3, waits for no other rank but for the last
        step's weights, so that a slow one shows. On a GPU its own clock is read, and only at the
        next row."""
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
        - mfu: model FLOPs utilisation, the share of the devices' peak that went into the model
          (arXiv 2204.02311, appendix B), if their data sheet is known
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
        rate = (images - self._images) / elapsed
        figures = {
            "images_per_second": rate,
            "data_wait": max(waits),
            "slowest_rank": works.index(max(works)),
            "slowest_rank_lag": max(works) / statistics.median(works) - 1,
            "memory_gib": max(memories),
        }
        if self._peak is not None:
            figures["mfu"] = rate * self._flops / (self._peak * distributed.world_size())
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
