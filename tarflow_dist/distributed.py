"""The process group: one process alone or many ranks, all through the same calls."""

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tarflow_dist import files
from tarflow_dist.errors import UserError

T = TypeVar("T")
_counters = count()


def init(timeout: timedelta | None = None) -> torch.device:
    """Joins the process group, or makes one of a single process, and returns this rank's device.
    A collective that takes longer than `timeout` (None: torch's own) is an error.

    Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), as torchrun sets it; without RANK this is the only process.

    Raises:
        UserError: srun started several processes and nothing told them their ranks, or a machine
            with GPUs has fewer of them than ranks, or there is no network at all.
    """
    alone = "RANK" not in os.environ
    if alone:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise UserError("srun alone sets no ranks: start torchrun, one task a node, under it")
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ranks, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if torch.cuda.is_available() and ranks > cards:
        raise UserError(
            f"{ranks} ranks were started on a machine where {cards} GPU{'s' * (cards > 1)} can be "
            "seen: start one a GPU, or set CUDA_VISIBLE_DEVICES= (to nothing) to compute on the CPU"
        )
    atexit.register(_wait_for_gloo)
    device, backend, device_id = torch.device("cpu"), "gloo", None
    if torch.cuda.is_available():
        device = device_id = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    own: dict[str, Any] = {}
    if alone:
        own = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(backend, device_id=device_id, timeout=timeout, **own)
    except RuntimeError as error:
        if "interface" not in str(error):
            raise
        raise UserError(
            "there is no network here, not even within this machine, which gloo needs for a "
            "single process, too: bring up the loopback interface (ip link set lo up)"
        ) from error
    return device


def _wait_for_gloo() -> None:
    """Before Python 3.14 a thread of gloo's aborts a process that ends before it has let go of the
    last collective's tensor, and DeepSpeed keeps such threads beyond destroy_process_group."""
    with suppress(KeyboardInterrupt):
        time.sleep(0.1)


def device_name(device: torch.device) -> str:
    """A GPU's name, or cpu and its vector instructions, on which the last bits depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def shutdown() -> None:
    """Leaves the process group; every rank has reached this point."""
    dist.barrier()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank. Goes through host memory: the device isn't awaited."""
    return bool(sum_over_ranks(torch.tensor(int(flag))))


class AnyRank:
    """Questions to all ranks that keep neither the host nor the device waiting: they travel beside
    the device's work from `ask` to `answers`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ask(self, *flags: bool) -> None:
        """Each rank's flags, the same number on all."""
        with torch.cuda.stream(self._stream):  # nothing, on a CPU
            totals = torch.zeros(len(flags), device=self._device)
            for total, flag in zip(totals, flags, strict=True):
                total.fill_(flag)  # a kernel's argument: a copy from the host would wait
            self._work = dist.all_reduce(totals, async_op=True)
            if self._stream is not None:
                self._work.wait()  # the stream does
                totals = totals.to("cpu", non_blocking=True)
        self._totals = totals

    def answers(self) -> list[bool]:
        """For each of the flags asked about last, whether it was set on any rank."""
        if self._stream is None:
            self._work.wait()
        else:
            self._stream.synchronize()
        return [bool(total) for total in self._totals.tolist()]


def gather(value: T) -> list[T]:
    """Every rank's `value`, by rank, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def to_main(value: T) -> list[T] | None:
    """Every rank's `value`, by rank, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    values: list[T] | None = [value] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


class Counter:
    """A number, at first 0, that each rank adds to in its own time: nothing waits for the others.
    Every rank makes its counters in the same order."""

    def __init__(self) -> None:
        self._key = f"tarflow_dist/counter/{next(_counters)}"
        # the store that the ranks met through; torch has no public name for it
        met = dist.distributed_c10d._get_default_store
        self._store = met() if world_size() > 1 else dist.HashStore()

    def add(self, amount: int) -> int:
        """Adds `amount`, which may be 0, and returns the new value."""
        return int(self._store.add(self._key, amount))


def say(sentence: str) -> None:
    """Rank 0 prints it to stderr."""
    if is_main():
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def together(failure: str) -> Iterator[None]:
    """Raises on every rank what the body raises on one, if it is the user's to mend: a `UserError`,
    or an `OSError` as one that begins with `failure`. Collective."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{failure}: {error.strerror or error}"
    problem = next(filter(None, gather(problem)), None)
    if problem is not None:
        raise UserError(problem)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other jobs out of it while the body runs. Rank 0 holds the lock for
    all.

    Raises:
        UserError: on every rank, if another job writes there or the folder can't be made.
    """
    with ExitStack() as held:
        with together(f"the folder {folder} can't be written"):
            if is_main():
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(files.lock_folder(folder))
        yield
