"""--local: what becomes of the other ranks when one fails."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest

from slurm import local
from slurm.job import Job
from slurm.resources import Resources
from slurm.tasks import Task


class OneFails(Job):
    """Rank 0 waits for what will not come."""

    def _run(self) -> bool:
        (self.folder / f"ready-{os.environ['RANK']}").touch()
        if os.environ["RANK"] == "0" or self.task.name == "interrupted":
            time.sleep(600)
        while not list(self.folder.glob("ready-0")):
            time.sleep(0.05)
        if self.task.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("of its own")


@pytest.mark.parametrize(
    ("kind", "setup"),
    [
        ("raises", []),
        *((k, ["export A=1"]) for k in ("killed", "interrupted")),
        ("misses a module", ["module_that_there_is_not load cuda"]),
    ],
)
def test_none_outlives_the_job(
    kind: str,
    setup: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    terminated = signal.getsignal(signal.SIGTERM)
    resources = Resources(gpus_per_node=0, tasks_per_node=2, setup=setup)
    job = OneFails(tmp_path, Task(kind, (), tmp_path, resources))
    try:
        ranks = local.start(job)
        wait = ranks.wait

        def interrupt_both(timeout: float, period: float) -> object:
            while kind == "interrupted" and len(list(tmp_path.glob("ready-*"))) < 2:
                time.sleep(0.05)
            monkeypatch.setattr(ranks, "wait", wait)
            if kind == "interrupted":
                raise KeyboardInterrupt
            return wait(timeout, period)

        monkeypatch.setattr(ranks, "wait", interrupt_both)
        ended = local.watch(ranks, job, seconds=3600)
    finally:
        signal.signal(signal.SIGTERM, terminated)
        logging.disable(logging.NOTSET)
    assert ended == ("interrupted" if kind == "interrupted" else "crashed")
    processes = [handler.proc for handler in ranks.subprocess_handlers.values()]
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)
    told = capsys.readouterr().err
    if kind == "killed":
        assert "rank 1 was the first to end, without a word" in told
    elif kind == "raises":
        assert "crashed: rank 1 on " in told
        assert "ValueError: of its own" in told
        assert "first to end" not in told
    elif kind == "misses a module":
        assert "module_that_there_is_not: command not found" in told
        assert "as one whose setup fails" in told
