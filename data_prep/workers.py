"""A function over many tasks, in this process or in many: the same results in the same order."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from operator import attrgetter
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from tarflow_dist.errors import UserError

IN_FLIGHT = 4  # times the workers: tasks that are waiting, at work or done
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
    processes: list[_Process[Task, Result]] = []
    sent_to: deque[_Process[Task, Result]] = deque()  # for each task, the earliest first
    resource_tracker.ensure_running()  # or the first process starts it, which lets interrupts in
    try:
        for task in tasks:
            process = min(processes, key=attrgetter("busy"), default=None)
            if process is None or (process.busy and len(processes) < workers):
                with _interrupts_held():
                    process = _Process(function)
                    processes.append(process)
            process.send(task)
            sent_to.append(process)
            if len(sent_to) >= IN_FLIGHT * workers:
                yield sent_to.popleft().receive()
        while sent_to:
            yield sent_to.popleft().receive()
    finally:
        for process in processes:
            process.end()


class _Process(Generic[Task, Result]):
    """Applies `function` to one task after another in a process with a pipe of its own, so that its
    death is noticed even in the middle of a message; with the one queue of a ProcessPoolExecutor
    all wait forever for a worker that was killed there. Threads on both sides empty the pipe, so
    that neither waits for the other to do so."""

    def __init__(self, function: Callable[[Task], Result]):
        # spawned, since a fork copies locks that this process's threads may hold
        context = multiprocessing.get_context("spawn")
        self._pipe, its_pipe = context.Pipe()
        self._process = context.Process(target=_work, args=(function, its_pipe), daemon=True)
        self._process.start()
        its_pipe.close()
        self._outcomes: SimpleQueue[bytes | None] = SimpleQueue()
        self._sent = self._done = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def busy(self) -> int:
        """Tasks that were sent and aren't done."""
        return self._sent - self._done

    def send(self, task: Task) -> None:
        data = pickle.dumps(task)
        self._sent += 1
        with suppress(ConnectionError):  # it was killed: `receive` tells
            self._pipe.send_bytes(data)

    def receive(self) -> Result:
        """Waits for the result of the earliest task whose result was not received."""
        outcome = self._outcomes.get()
        if outcome is None:
            raise UserError(
                "a worker process was killed, mostly that is for want of memory: give the same "
                "command again to go on, with fewer --workers"
            )
        error, result = pickle.loads(outcome)
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self._reader.join()
        self._pipe.close()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                outcome = self._pipe.recv_bytes()
                self._done += 1
                self._outcomes.put(outcome)
        self._outcomes.put(None)


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    tasks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read_tasks, args=(pipe, tasks), daemon=True).start()
    with suppress(ConnectionError):  # the parent was killed
        while True:
            pipe.send_bytes(_outcome(function, tasks.get()))


def _read_tasks(pipe: Connection, tasks: "SimpleQueue[bytes]") -> None:
    """Ends this process when the parent was killed."""
    with suppress(EOFError, OSError):
        while True:
            tasks.put(pipe.recv_bytes())
    os._exit(1)


def _outcome(function: Callable[[Any], Any], task: bytes) -> bytes:
    """The result of a pickled task, or the error: (error or None, result), pickled."""
    try:
        return pickle.dumps((None, function(pickle.loads(task))))
    except Exception as error:
        error.add_note("In a worker process:\n" + traceback.format_exc())
        return pickle.dumps((error, None))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C, which goes to all processes of a terminal, waits until the body ends. Threads and
    processes that start in it never get it: it is for the main thread to act on."""
    came: list[int] = []
    # the mask is this thread's alone: one of a library's may take the signal, and Python would
    # interrupt the main thread for it
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
