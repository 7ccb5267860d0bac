"""--local: what becomes of the other ranks when one fails."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import processes_of
from strikes import until

from slurm import local
from slurm.job import Job
from slurm.job_record import read_outcome
from slurm.resources import Resources
from slurm.tasks import Task
from tarflow_dist.errors import UserError


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


@pytest.fixture(autouse=True)
def _this_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ranks."""
    here = Path(__file__).parent
    path = f"{here}:{here.parent}:{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)


def job_of(kind: str, folder: Path, setup: list[str]) -> Job:
    resources = Resources(gpus_per_node=0, tasks_per_node=2, setup=setup)
    return OneFails(folder, Task(kind, (), folder, resources))


@pytest.mark.parametrize(
    ("kind", "setup"),
    [
        ("raises", []),
        *((k, ["export A=1"]) for k in ("killed", "interrupted")),
    ],
)
def test_none_outlives_the_job(
    kind: str,
    setup: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminated = signal.getsignal(signal.SIGTERM)
    job = job_of(kind, tmp_path, setup)
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


def test_setup_runs_once_and_may_fail(tmp_path: Path) -> None:
    lines = [f"echo once >> {tmp_path / 'log'}", "module_that_there_is_not load cuda"]
    with pytest.raises(UserError, match=r"setup fails: .*module_that_there_is_not"):
        local.start(job_of("raises", tmp_path, lines))
    assert (tmp_path / "log").read_text() == "once\n"


def test_ranks_end_with_the_launcher(tmp_path: Path) -> None:
    start = "from test_local import *; local.start(job_of('interrupted', Path(sys.argv[1]), []))"
    command = [sys.executable, "-c", f"{start}; time.sleep(600)", str(tmp_path)]
    launcher = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both ranks")
    launcher.kill()
    launcher.wait()
    until(lambda: not processes_of(str(tmp_path)), "their end")
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome["state"] == "interrupted"
