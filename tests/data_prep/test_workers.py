"""Workers that fail in every way, and what is told of it."""

import os
import signal
import sys
import threading
import time

import pytest
from commands import FRESH

from data_prep.workers import map_in_order
from tarflow_dist.errors import UserError

LARGE = 20_000_000  # bytes, more than a pipe takes at once


def dies_while_it_sends(task: int) -> bytes:
    sender = threading.get_ident()

    def kill() -> None:
        while sys._current_frames()[sender].f_code.co_name != "_send":  # multiprocessing's
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    return bytes(LARGE)


def meets_dying_workers() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        next(map_in_order(dies_while_it_sends, range(10), 2))


def test_a_worker_killed_in_the_middle_of_a_message() -> None:
    process = FRESH.Process(target=meets_dying_workers)
    process.start()
    process.join(60)
    process.kill()  # if it still waits
    process.join()
    assert process.exitcode == 0


def fails_at_three(task: int) -> int:
    time.sleep(0.05 * (task == 0))
    if task == 3:
        raise LookupError("three")
    return task * task


def test_an_error_comes_in_its_turn_and_says_where_it_was_raised() -> None:
    results = map_in_order(fails_at_three, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(LookupError, match="three") as caught:
        next(results)
    assert "in fails_at_three" in "".join(caught.value.__notes__)


def parent_of_workers(said: str) -> None:
    with open(said, "w") as file:
        for result in map_in_order(own_id, range(1000), 2):
            print(result, file=file, flush=True)


def own_id(task: int) -> int:
    time.sleep(0.01)
    return os.getpid()


def test_workers_end_with_their_parent(tmp_path) -> None:
    said = tmp_path / "said"
    process = FRESH.Process(target=parent_of_workers, args=(str(said),))
    process.start()
    while not (said.exists() and len(said.read_text().split()) > 20):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    workers = set(said.read_text().split())
    assert len(workers) == 2
    for worker in workers:
        patience = time.monotonic() + 30
        while os.path.exists(f"/proc/{worker}") and time.monotonic() < patience:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{worker}")
