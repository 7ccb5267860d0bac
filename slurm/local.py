"""--local: the same job on this machine, a process a rank."""

import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.helpers import clean_env

from slurm import submission
from slurm.job import Job, read_outcome
from slurm.resources import Resources
from slurm.submission import CODE
from slurm.tasks import Task
from tarflow_dist.errors import UserError
from tarflow_dist.train import EXIT_INTERRUPTED

EXIT_CODES = {"finished": 0, "interrupted": EXIT_INTERRUPTED, "refused": 2, "crashed": 1}
ENDED = (0, EXIT_INTERRUPTED)
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
    ranks = start(job, task.ranks_a_node(resources), resources)
    print(f"logs in {folder}", flush=True)
    return watch(ranks, folder, seconds=60 * resources.minutes - resources.signal_delay)


def start(job: Job, count: int, resources: Resources) -> list[subprocess.Popen[bytes]]:
    """Starts `count` ranks of the job, which leave Ctrl-C to this process.

    Raises:
        UserError: a shell line of `resources.setup` fails.
    """
    file = job.folder / "job.pkl"
    file.write_bytes(pickle.dumps(job))
    command = [resources.python or sys.executable, "-u", "-P", "-m", "slurm.job", str(file)]
    common = _environment(job.folder, resources)
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    # the port is below those that Linux gives the near ends of connections, which may be in use
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 12_000)}
    ranks = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a new process takes over
    for rank in range(count):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with _log(job.folder, rank).open("wb") as log:
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    signal.signal(signal.SIGINT, before)
    return ranks


def _environment(folder: Path, resources: Resources) -> dict[str, str]:
    """The variables of all ranks, as the lines of `resources.setup` leave them."""
    with clean_env():
        environment = dict(os.environ)
    path = [str(folder / CODE), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"OMP_NUM_THREADS": "1", **resources.env, "PYTHONPATH": os.pathsep.join(path)}
    if not resources.gpus_per_node:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if not resources.setup:
        return environment
    file = folder / "environment"
    script = " && ".join([*resources.setup, f"env -0 >{shlex.quote(str(file))}"])
    if subprocess.run(["bash", "-c", script], env=environment).returncode:
        raise UserError(f"setup fails: {' && '.join(resources.setup)}")
    lines = file.read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(line.split("=", 1) for line in lines if line)


def _log(folder: Path, rank: int) -> Path:
    return folder / f"local_{rank}_log.out"


def watch(ranks: list[subprocess.Popen[bytes]], folder: Path, *, seconds: float) -> str:
    """Shows rank 0's log until all ranks have ended, and ends them once one has failed. Ctrl-C,
    SIGTERM and the end of `seconds` have them save.

    Returns:
        The outcome.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + seconds
    shown, failed = 0, list[int]()
    while True:
        try:
            codes = [process.poll() for process in ranks]
            shown = _show_log(_log(folder, 0), shown)
            if None not in codes:
                return _outcome(folder, failed)
            failed = failed or [r for r, code in enumerate(codes) if code not in (None, *ENDED)]
            if failed:
                _end(ranks)
            if time.monotonic() >= end:
                end = float("inf")
                raise KeyboardInterrupt
            time.sleep(0.2)
        except KeyboardInterrupt:
            for process in ranks:
                process.terminate()


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kills those that don't end by themselves: what they wait for will not come."""
    patience = time.monotonic() + GRACE
    for process in ranks:
        try:
            process.wait(max(0.0, patience - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _show_log(log: Path, shown: int) -> int:
    """Prints what was written past `shown` characters, and returns how many there are now."""
    text = log.read_text(errors="replace")
    print(text[shown:], end="", flush=True)
    return len(text)


def _outcome(folder: Path, failed: list[int]) -> str:
    """`failed`: the ranks that were the first to."""
    outcome = read_outcome(folder) or {"state": "crashed", "reason": ""}
    if outcome["state"] == "crashed" and failed and outcome.get("rank") not in failed:
        print(
            f"rank {failed[0]} was the first to end, without a word, as one that is killed for "
            f"want of memory; logs in {folder}",
            file=sys.stderr,
        )
    if outcome["reason"]:  # of whichever rank was first, and the log that was shown is rank 0's
        print(f"{outcome['state']}: {outcome['reason']}", file=sys.stderr)
    return str(outcome["state"])
