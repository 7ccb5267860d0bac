"""A function over many tasks, in this process or in many: the same results in the same order."""

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

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
    else:
        with _processes(function, workers) as processes:
            yield from _map_in_threads(processes, tasks, workers)


def _map_in_threads(
    processes: "SimpleQueue[_Process[Task, Result]]", tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Each of `workers` threads hands a task to a process that has none, and waits for it."""

    def by_a_process(task: Task) -> Result:
        process = processes.get()
        try:
            return process(task)
        finally:
            processes.put(process)

    waiting: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for task in tasks:
            waiting.append(threads.submit(by_a_process, task))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


class _Process(Generic[Task, Result]):
    """Applies `function` in a process of its own. Nobody else holds the other end of its pipe, so
    that each learns of the other's end, even in the middle of a message; with the one queue of a
    ProcessPoolExecutor all wait forever for a worker that was killed there."""

    def __init__(self, function: Callable[[Task], Result]):
        # spawned, since a fork copies locks that this process's threads may hold
        context = multiprocessing.get_context("spawn")
        self._pipe, its_pipe = context.Pipe()
        self._process = context.Process(target=_work, args=(function, its_pipe), daemon=True)
        self._process.start()
        its_pipe.close()

    def __call__(self, task: Task) -> Result:
        try:
            self._pipe.send(task)
            error, result = self._pipe.recv()
        except (EOFError, OSError) as ended:
            raise UserError(
                "a worker process was killed, mostly that is for want of memory: give the same "
                "command again to go on, with fewer --workers"
            ) from ended
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._pipe.close()
        self._process.join()


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    with suppress(EOFError, OSError):  # the parent is done, or was killed
        while True:
            pipe.send(_outcome(function, pipe.recv()))


def _outcome(function: Callable[[Task], Result], task: Task) -> tuple[Exception | None, Any]:
    try:
        return None, function(task)
    except Exception as error:
        error.add_note("In a worker process:\n" + traceback.format_exc())
        return error, None


@contextmanager
def _processes(
    function: Callable[[Task], Result], count: int
) -> Iterator["SimpleQueue[_Process[Task, Result]]"]:
    """Started when the body begins, ended with it; all have nothing to do."""
    started: list[_Process[Task, Result]] = []
    idle: SimpleQueue[_Process[Task, Result]] = SimpleQueue()
    try:
        with _interrupts_held():
            for _ in range(count):
                started.append(_Process(function))
                idle.put(started[-1])
        yield idle
    finally:
        for process in started:
            process.end()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C, which goes to all processes of a terminal, waits until the body ends. Processes that
    start in it never get it: it is for their parent to act on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
