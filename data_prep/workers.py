"""A function over many tasks, in this process or in many: the same results in the same order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from tarflow_dist.errors import UserError

IN_FLIGHT = 4  # tasks a worker may be ahead
Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """`function` of each of `tasks`, in their order. Only so many of them are held at a time.

    Args:
        workers: processes; 1 does it in this one.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    try:
        yield from _map_in_pool(function, tasks, workers)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, mostly that is for want of memory: give the same "
            "command again to go on, with fewer --workers"
        ) from error


def _map_in_pool(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    # spawned, since a fork copies locks that this process's threads may hold
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        for task in tasks:
            with _interrupts_held():  # a submission may start a worker
                waiting.append(pool.submit(function, task))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C, which goes to all processes of a terminal, waits until the body ends. Processes that
    start in it never get it: it is for their parent to act on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_with_parent() -> None:
    """A worker waits for work forever, also when its parent has been killed."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
