"""The jobs of a run: what is kept of each in RUN/slurm/TIME-TASK/, beside its code, config and
logs, and what Slurm knows of it: squeue while it is there, sacct afterwards."""

import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tarflow_dist.errors import UserError
from tarflow_dist.files import from_saved, read_json, read_sealed, write_sealed
from tarflow_dist.training import latest_checkpoint

FOLDER = "slurm"
FILE = "job.json"
VERSION = 1
OUTCOME = "outcome.json"  # of a job's ranks
STOP = "stop"  # in a job's folder: it ends instead of being requeued
ERROR = re.compile(r"error|exception|killed|traceback", re.IGNORECASE)
# lines that only say that something else went wrong
ECHOES = re.compile(
    r"^Traceback|submitit ERROR|^slurmstepd\S*: error: \*\*\*|^srun: error: .*Exited with"
)
GONE = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED", "UNKNOWN"),
}


@dataclass(frozen=True)
class JobState:
    """`name` is Slurm's word, such as RUNNING; `detail` its reason or nodes."""

    name: str
    detail: str
    restarts: int = 0

    @property
    def active(self) -> bool:
        return self.name not in GONE


@dataclass(frozen=True)
class JobRecord:
    """A submission.

    Attributes:
        folder: the job's.
        run: the folder of the run, or what a task has in its place.
        task: its name.
        attempts: ends without progress after which it is not requeued.
        job_id: Slurm's; empty until it is submitted.
        command: how it was launched.
    """

    folder: Path
    run: Path
    task: str
    attempts: int
    command: str
    job_id: str = ""

    def newest_checkpoint(self) -> str:
        """The name of the run's newest checkpoint; empty for none, and for tasks without."""
        folder = self.run / latest_checkpoint.FOLDER
        newest = latest_checkpoint.newest(folder) if self.task == "train" else None
        return newest.name if newest else ""

    def state(self) -> JobState:
        """What Slurm says of the job.

        Raises:
            UserError: there is no Slurm here.
        """
        job = ("--noheader", "--jobs", self.job_id)
        waiting = ask_slurm("squeue", *job, "--format=%T|%r|%N|%S")
        of_each_start = ("--parsable2", "--allocations", "--duplicates")
        told = ask_slurm("sacct", *job, *of_each_start, "--format=State,NodeList,ExitCode")
        starts = (told or "").splitlines()  # none without accounting
        restarts = max(len(starts) - 1, 0)
        if waiting and waiting.strip():
            name, reason, nodes, start = waiting.strip().splitlines()[0].split("|")
            if name != "PENDING":
                return JobState(name, nodes, restarts)
            when = "" if start in ("N/A", "") else f", expected to start {start}"
            return JobState(name, f"{reason}{when}", restarts)
        if starts:
            name, nodes, code = starts[-1].split("|")
            return JobState(name.split()[0], f"{nodes}, exit code {code}", restarts)
        return JobState("UNKNOWN", "neither squeue nor sacct knows the job")

    def write(self) -> None:
        saved = asdict(self) | {"folder": str(self.folder), "run": str(self.run)}
        write_sealed(self.folder / FILE, saved, version=VERSION)

    @classmethod
    def read(cls, folder: Path) -> "JobRecord":
        """Raises `UserError` if it is damaged."""
        try:
            saved = read_sealed(folder / FILE, version=VERSION)
            return from_saved(cls, saved | {"folder": folder, "run": Path(saved["run"])})
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{folder / FILE} can't be read ({error}): remove {folder}") from error


def job_records(run: Path) -> list[JobRecord]:
    """All submissions below `run`, the oldest first."""
    found = [JobRecord.read(file.parent) for file in sorted((run / FOLDER).glob(f"*/{FILE}"))]
    return [record for record in found if record.job_id]


def ask_slurm(*command: str) -> str | None:
    """What a Slurm command prints; None if it fails.

    Raises:
        UserError: there is no Slurm here.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no Slurm on this machine ({command[0]} is not found): --dry-run shows the "
            "job, --local runs it here"
        ) from error
    return done.stdout if done.returncode == 0 else None


def note_outcome(folder: Path, state: str, reason: str = "") -> bool:
    """Notes in a job's folder how this rank ended: "finished", "interrupted", "refused" (a user's
    error) or "crashed". Returns whether it was the first: a first error's victims come later."""
    outcome = {"state": state, "reason": reason, "rank": int(os.environ["RANK"])}
    try:
        with (folder / OUTCOME).open("x") as file:
            json.dump(outcome, file)
    except FileExistsError:
        return False
    return True


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """What the first rank to end noted in a job's folder; None if it was killed before it could."""
    try:
        return dict(read_json(folder / OUTCOME))
    except (OSError, TypeError, ValueError):
        return None


def last_error(folder: Path) -> str:
    """The last line of a job's logs that tells of an error; empty if there is none."""
    logs = sorted(folder.glob("*_log.err"), key=lambda file: file.stat().st_mtime, reverse=True)
    for log in logs:
        for line in reversed(log.read_text(errors="replace").splitlines()[-200:]):
            if ERROR.search(line) and not ECHOES.search(line):
                return line.strip()
    return ""
