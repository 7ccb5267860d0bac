"""--local: the same job through submitit's local executor."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import submitit
from submitit.helpers import clean_env, environment_variables

from slurm import submission
from slurm.job import EXIT_INTERRUPTED, OUTCOME
from slurm.resources import Resources
from slurm.script import CODE
from slurm.tasks import Task
from tarflow_dist.errors import UserError
from tarflow_dist.files import read_json

EXIT_CODES = {"finished": 0, "interrupted": EXIT_INTERRUPTED, "refused": 2, "crashed": 1}
CONTROLLER, RANK = "submitit.local._local", "SUBMITIT_LOCAL_GLOBALID"
"""Its module, and the variable that it sets."""
GRACE = 5.0
"""Seconds that the other ranks of one that failed have to end by themselves: mostly they meet the
same error, or miss that one."""


def here(resources: Resources) -> Resources:
    """`resources` on this machine: all its GPUs, or one rank on the CPU, unless they say how many.

    Raises:
        UserError: they are more than this machine has.
    """
    if resources.nodes > 1:
        raise UserError(f"--local has one node, not --nodes {resources.nodes}")
    import torch

    there = torch.cuda.device_count()
    if "gpus_per_node" not in resources.model_fields_set:
        kind = f"{there} GPU{'s' * (there > 1)}" if there else "the CPU"
        print(f"--local: on {kind}; --gpus-per-node and --tasks-per-node choose otherwise")
        return resources.model_copy(update={"gpus_per_node": there})
    if resources.gpus_per_node > there:
        raise UserError(
            f"--local: {resources.gpus_per_node} GPUs were asked for, and this machine has "
            f"{there}: give --gpus-per-node {there}"
        )
    return resources


def run(chain: Sequence[Task], resources: Resources) -> int:
    """Runs the tasks one after another and shows rank 0's log. Ctrl-C saves and ends.

    Returns:
        The exit code: 0 finished, 75 interrupted and saved, 2 a mistake of the user's, 1 a crash.
    """
    for task in chain:
        state = _run(task, resources)
        if state != "finished":
            return EXIT_CODES[state]
    return 0


def _run(task: Task, resources: Resources) -> str:
    folder = submission.new_folder(task)
    job = submission.prepare(task, resources, folder)
    python = shlex.quote(resources.python or sys.executable)
    executor = submitit.LocalExecutor(folder, python=f"{python} -P")
    executor.update_parameters(
        tasks_per_node=task.ranks_a_node(resources),
        gpus_per_node=resources.gpus_per_node,
        timeout_min=resources.minutes,
        signal_delay_s=resources.signal_delay,
        setup=resources.setup,
        stderr_to_stdout=True,
    )
    path = [str(folder / CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", **resources.env, "PYTHONPATH": os.pathsep.join(path)}
    with clean_env(), environment_variables(**environment), _ctrl_c_ignored():
        submitted = executor.submit(job)
    print(f"logs in {folder}", flush=True)
    return watch(submitted, folder)


def watch(submitted: submitit.Job, folder: Path) -> str:
    """Shows rank 0's log until all ranks have ended, and ends them once one has failed. Ctrl-C and
    SIGTERM have them save.

    Returns:
        The outcome.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ranks = Ranks(submitted.job_id)
    shown = 0
    while True:
        try:
            ended = submitted.done()
            shown = _show_log(submitted.paths.stdout, shown)
            if ended:
                return _outcome(folder, ranks)
            ranks.look()
            one_ended = ranks.first_gone or (folder / OUTCOME).exists()
            if one_ended and _read_outcome(folder)["state"] in ("crashed", "refused"):
                ranks.end()
            time.sleep(0.2)
        except KeyboardInterrupt:
            ranks.interrupt()


class Ranks:
    """The processes of a job's ranks. submitit's controller starts them, and waits until the last
    of them ends, whatever becomes of the others."""

    def __init__(self, job_id: str):
        self._started = psutil.Process(int(job_id))  # the controller, or a shell that starts it
        self._controllers: list[psutil.Process] = []  # one, once it runs
        self._running: dict[int, psutil.Process] = {}
        self.first_gone: list[int] = []

    def look(self) -> None:
        """Takes note of which of them run, and which were the first to end."""
        with suppress(psutil.Error):  # some end meanwhile
            processes = [self._started, *self._started.children()]
            self._controllers = [p for p in processes if CONTROLLER in p.cmdline()]
            ranks = {p.environ().get(RANK): p for c in self._controllers for p in c.children()}
            running = {int(rank): process for rank, process in ranks.items() if rank is not None}
            self.first_gone = self.first_gone or sorted(self._running.keys() - running.keys())
            self._running = running

    def interrupt(self) -> None:
        """Has them save and end: the controller tells them."""
        with suppress(psutil.Error):
            for process in self._controllers or [self._started, *self._started.children()]:
                process.terminate()

    def end(self) -> None:
        """Kills those that don't end by themselves: what they wait for will not come."""
        _, waiting = psutil.wait_procs(self._running.values(), timeout=GRACE)
        for process in waiting:
            process.kill()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes that start meanwhile leave Ctrl-C alone: submitit's controller would kill the ranks
    a second after it, in the middle of their checkpoint."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show_log(log: Path, shown: int) -> int:
    """Prints what was written past `shown` characters, and returns how many there are now."""
    text = log.read_text(errors="replace") if log.exists() else ""
    print(text[shown:], end="", flush=True)
    return len(text)


def _outcome(folder: Path, ranks: Ranks) -> str:
    outcome = _read_outcome(folder)
    first = ranks.first_gone
    if outcome["state"] == "crashed" and first and outcome.get("rank") not in first:
        print(
            f"rank {first[0]} was the first to end, without a word, as one that is killed for want "
            f"of memory; logs in {folder}",
            file=sys.stderr,
        )
    if outcome["reason"]:  # of whichever rank was first, and the log that was shown is rank 0's
        print(f"{outcome['state']}: {outcome['reason']}", file=sys.stderr)
    return str(outcome["state"])


def _read_outcome(folder: Path) -> dict[str, Any]:
    """What the first rank to end noted; a crash, if none did."""
    try:
        return dict(read_json(folder / OUTCOME))
    except (FileNotFoundError, ValueError):  # or is just being written
        return {"state": "crashed", "reason": ""}
