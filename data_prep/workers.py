"""A function over many tasks, in this process or in many: the same results in the same order."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

from tarflow_dist.errors import UserError

# what ends a command; it goes to all processes of a terminal, or of a rank of Slurm's
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}
Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Generator[Result, None, None]:
    """`function` of each of `tasks`, in their order. Those that are at work when the caller leaves
    are killed.

    Args:
        workers: processes; 1 does it in this one. Results must be small, a few thousand bytes when
            they are pickled: who is killed in the middle of a larger one may hold up the others.

    Raises:
        UserError: a worker was killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    before = set(multiprocessing.active_children())
    # spawned, since a fork copies locks that this process's threads may hold
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        with _signals_held():
            resource_tracker.ensure_running()  # or the first process does it, and lets them in
            futures = [pool.submit(function, task) for task in tasks]
        while futures:
            yield futures.pop(0).result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, mostly that is for want of memory: give the same "
            "command again to go on, with fewer --workers"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A pool's processes would wait for a parent that was killed."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _signals_held() -> Iterator[None]:
    """SIGNALS wait until the body ends. Threads and processes that start in it never get them: they
    are for the main thread to act on."""
    came: list[int] = []
    # the mask is this thread's alone: one of a library's may take Ctrl-C, and Python would
    # interrupt the main thread for it
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
