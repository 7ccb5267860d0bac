"""A function over many tasks, in this process or in many: the same results in the same order."""

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from tarflow_dist.errors import UserError

IN_FLIGHT = 4  # tasks that are waiting, at work or done, for each worker
Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """`function` of each of `tasks`, in their order. Only so many of them are held at a time.

    Args:
        workers: processes, started as they are needed; 1 does it in this one. To and from others
            all is sent by pickle: function, tasks, results and errors.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 1:
        yield from map(function, tasks)
    else:
        yield from _map_in_processes(function, tasks, workers)


def _map_in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Each of up to `workers` threads hands a task to an idle process, and waits for it."""
    started: list[_Process[Task, Result]] = []
    idle: SimpleQueue[_Process[Task, Result]] = SimpleQueue()

    def in_a_process(task: Task) -> Result:
        try:
            process = idle.get_nowait()
        except Empty:
            process = _Process(function)
            started.append(process)
        try:
            return process(task)
        finally:
            idle.put(process)

    waiting: deque[Future[Result]] = deque()
    resource_tracker.ensure_running()  # or the first process starts it, which lets interrupts in
    threads = ThreadPoolExecutor(workers)
    try:
        for task in tasks:
            with _interrupts_held():  # a submission may start a thread, and that a process
                waiting.append(threads.submit(in_a_process, task))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
        for process in started:
            process.end()


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
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C, which goes to all processes of a terminal, waits until the body ends. Threads and
    processes that start in it never get it: it is for this thread to act on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
