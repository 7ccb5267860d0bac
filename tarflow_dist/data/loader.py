"""Shards to batches, read and decoded in worker processes, from an exact position in the run."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.synchronize import Event

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards
from tarflow_dist.errors import UserError


@dataclass(frozen=True)
class Batch:
    """b images, and who they are; `index` and `epoch` key their random numbers."""

    images: Tensor
    """(b, C, H, W) uint8, in memory (b, H, W, C) as decoders leave it: the device turns it."""
    labels: Tensor
    """(b,) int64."""
    index: Tensor
    """(b,) int64 in the split."""
    epoch: Tensor
    """(b,) int64."""

    def pin_memory(self) -> "Batch":
        """For the DataLoader, where there is a GPU to copy to."""
        return Batch(*(tensor.pin_memory() for tensor in vars(self).values()))


def train_batches(
    shards: Shards,
    order: ImageOrder,
    *,
    position: int,
    batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """This rank's micro-batches, without end, from `position` (images seen in the run) on.

    Each global batch is the next `batch_size` images of the order, whatever the world size; rank r
    takes the r-th part of it, in micro-batches. Nothing before `position` is read.

    Args:
        batch_size: of the global batch; a multiple of micro_batch_size · world_size.
        num_workers: processes that read and decode; 0 does it here.
    """
    share = batch_size // world_size
    assert share * world_size == batch_size
    assert share % micro_batch_size == 0

    def picks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = position + rank * share
        while True:
            for step in range(0, share, micro_batch_size):
                yield order.take(start + step, micro_batch_size)
            start += batch_size

    return _load(shards, picks(), num_workers)


def eval_batches(
    shards: Shards, *, batch_size: int, rank: int, world_size: int, num_workers: int
) -> Iterator[Batch]:
    """Every image once over all ranks, in order: rank r has images r, r + world_size, … in batches
    of `batch_size`, the last one short. A rank may have one batch fewer than another."""
    mine = np.arange(rank, len(shards), world_size)
    parts = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    picks = ((np.zeros_like(part), part) for part in parts)
    return _load(shards, picks, num_workers)


def _load(
    shards: Shards, picks: Iterable[tuple[np.ndarray, np.ndarray]], num_workers: int
) -> Iterator[Batch]:
    """One batch for each (epochs, indexes) of `picks`, in their order.

    Raises:
        UserError: from the iterator, an image is missing or damaged.
    """
    loader = DataLoader(
        _Batches(shards),
        batch_size=None,
        sampler=picks,
        num_workers=num_workers,
        worker_init_fn=partial(_ignore_signals, _exiting()),
        pin_memory=torch.cuda.is_available(),
    )
    return map(_batch_or_raise, iter(loader))


class _Batches(Dataset[Batch | UserError]):
    def __init__(self, shards: Shards):
        self._shards = shards

    def __getitem__(self, pick: tuple[np.ndarray, np.ndarray]) -> Batch | UserError:
        """An error is returned and not raised: a worker would wrap its traceback around it."""
        epochs, indexes = pick
        channels, height, width = self._shards.image_shape
        stored = torch.empty(len(indexes), height, width, channels, dtype=torch.uint8)
        images = stored.permute(0, 3, 1, 2)
        labels = torch.empty(len(indexes), dtype=torch.int64)
        pixels, numbers = images.numpy(), labels.numpy()
        try:
            for i, index in enumerate(indexes.tolist()):
                pixels[i], numbers[i] = self._shards[index]
        except UserError as error:
            return error
        return Batch(images, labels, torch.from_numpy(indexes), torch.from_numpy(epochs))


def _batch_or_raise(loaded: Batch | UserError) -> Batch:
    try:
        if isinstance(loaded, UserError):
            raise loaded
        return loaded
    finally:
        # error, traceback and this frame would hold each other, and the loader with them: it can
        # end its workers only if it goes with its last reference, not in a garbage collection
        del loaded


@cache
def _exiting() -> Event:
    """Set when this process exits, for its workers to see."""
    event = multiprocessing.Event()
    atexit.register(event.set)
    return event


def _ignore_signals(exiting: Event, worker: int) -> None:
    """Signals to the job go to all its processes: the trainer acts on them, its workers read on.

    But when Python exits with batches still alive, as after an error, it sends its workers SIGTERM
    and waits for them forever: that one must be heeded.
    """
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.is_set() else None)
