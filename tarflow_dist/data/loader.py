"""Shards to batches, read and decoded in worker processes, from an exact position in the run."""

import atexit
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, cycle
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards
from tarflow_dist.errors import UserError

PREFETCH = 2  # batches that a worker is ahead
SHARED_MEMORY = Path("/dev/shm")  # where Linux has it; a container's is small
QUEUES = 1 << 16  # bytes of it that a worker's queues and events take, a page a semaphore


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

    Each global batch is the next `batch_size` images of the order, whatever the world size; each
    rank takes its share of it (`ImageOrder.share`), in micro-batches. Nothing before `position` is
    read.

    Args:
        batch_size: of the global batch; a multiple of micro_batch_size · world_size.
        num_workers: processes that read and decode; 0 does it here.
    """
    share = batch_size // world_size
    assert share * world_size == batch_size
    assert share % micro_batch_size == 0

    def picks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in count(position, batch_size):
            mine = order.share(start, batch_size, rank=rank, world_size=world_size)
            yield from map(order.take, np.split(mine, share // micro_batch_size))

    return _load(shards, picks(), micro_batch_size, num_workers)


def eval_batches(
    shards: Shards,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    count: int | None = None,
) -> Iterator[Batch]:
    """Every image once over all ranks, or `count` of them, evenly spread, in order: rank r has the
    r-th, the (r + world_size)-th, … in batches of `batch_size`, the last one short. A rank may have
    one batch fewer than another."""
    taken = min(count or len(shards), len(shards))
    mine = np.arange(rank, taken, world_size) * len(shards) // taken
    parts = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    picks = ((np.zeros_like(part), part) for part in parts)
    return _load(shards, picks, batch_size, num_workers)


def _load(
    shards: Shards,
    picks: Iterable[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """One batch for each (epochs, indexes) of `picks`, in their order.

    Workers write into slots, shared memory that is used over and over: to get new memory for each
    batch, as DataLoader has it, costs as much as to decode a small JPEG.

    Raises:
        UserError: there is too little shared memory; from the iterator, an image is missing or
            damaged.
    """
    channels, height, width = shards.image_shape
    # for the batches that workers are ahead, and the one that is handed out
    shape = (PREFETCH * num_workers + 1, batch_size, height, width, channels)
    slots = torch.empty(shape, dtype=torch.uint8)
    if num_workers:
        _check_shared_memory(slots.nbytes + (1 + num_workers) * QUEUES)
        slots.share_memory_()
    loader = DataLoader(
        _Decoder(shards, slots),
        batch_size=None,
        sampler=zip(cycle(range(len(slots))), picks, strict=False),
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=partial(_ignore_signals, _exiting()),
    )
    return map(partial(_take_out, slots), iter(loader))


def _check_shared_memory(needed: int) -> None:
    """Before it is used: a process that writes more of it than there is dies of SIGBUS."""
    if SHARED_MEMORY.exists() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise UserError(
            f"the loader's workers need {needed} bytes of shared memory, but {SHARED_MEMORY} has "
            f"{free} left: lower data.num_workers, or give the container more (docker run "
            "--shm-size)"
        )


@dataclass(frozen=True)
class _Decoded:
    """A batch whose images lie in a slot. No tuple: DataLoader would put its arrays into shared
    memory, each into some of its own."""

    slot: int
    labels: np.ndarray
    index: np.ndarray
    epoch: np.ndarray


class _Decoder(Dataset[_Decoded | UserError]):
    def __init__(self, shards: Shards, slots: Tensor):
        self._shards, self._slots = shards, slots

    def __getitem__(self, task: tuple[int, tuple[np.ndarray, np.ndarray]]) -> _Decoded | UserError:
        """An error is returned and not raised: a worker would wrap its traceback around it."""
        slot, (epochs, indexes) = task
        pixels = self._slots[slot].permute(0, 3, 1, 2).numpy()
        labels = np.empty(len(indexes), np.int64)
        try:
            for i, index in enumerate(indexes.tolist()):
                pixels[i], labels[i] = self._shards[index]
        except UserError as error:
            return error
        return _Decoded(slot, labels, indexes, epochs)


def _take_out(slots: Tensor, decoded: _Decoded | UserError) -> Batch:
    """Copies a batch from its slot, which a later one will be written to."""
    try:
        if isinstance(decoded, UserError):
            raise decoded
        images = slots[decoded.slot, : len(decoded.labels)]
        labels, index, epoch = map(torch.from_numpy, (decoded.labels, decoded.index, decoded.epoch))
        if torch.cuda.is_available():  # from pinned memory a copy to the GPU waits for nothing
            images, labels, index, epoch = map(Tensor.pin_memory, (images, labels, index, epoch))
        else:
            images = images.clone()
        return Batch(images.permute(0, 3, 1, 2), labels, index, epoch)
    finally:
        # error, traceback and this frame would hold each other, and the loader with them: it can
        # end its workers only if it goes with its last reference, not in a garbage collection
        del decoded


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
