"""Workers that fail in every way, and what is told of it."""

import os
import signal
import time

import pytest
from commands import FRESH

from data_prep.workers import map_in_order
from tarflow_dist.errors import UserError


def returns_at_once(task: int) -> tuple[int, int]:
    return task, os.getpid()


def meets_dying_workers() -> None:
    """Kills a worker that is anywhere: at a task, in a message, between two."""
    results = map_in_order(returns_at_once, range(5000), 2)
    for _ in range(500):
        _, process = next(results)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(UserError, match="a worker process was killed"):
        list(results)


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_worker_ends_the_work(attempt: int) -> None:
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
    assert "in fails_at_three" in str(caught.value.__cause__)


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
