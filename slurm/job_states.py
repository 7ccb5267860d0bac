"""What Slurm knows of a job: squeue while it is there, sacct afterwards."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from tarflow_dist.errors import UserError

GONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


@dataclass(frozen=True)
class JobState:
    """`state` is Slurm's word, such as RUNNING; `detail` its reason or nodes."""

    state: str
    detail: str = ""
    restarts: int = 0

    @property
    def active(self) -> bool:
        return self.state not in GONE | {"UNKNOWN", "DEADLINE", "REVOKED"}


def ask(*command: str) -> str | None:
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


def job_state(job_id: str) -> JobState:
    """Raises:
    UserError: there is no Slurm here.
    """
    waiting = ask("squeue", "--noheader", "--jobs", job_id, "--format=%T|%r|%N|%S")
    rows = accounted(job_id)
    restarts = max(len(rows) - 1, 0)
    if waiting and waiting.strip():
        state, reason, nodes, start = waiting.strip().splitlines()[0].split("|")
        if state == "PENDING":
            when = "" if start in ("N/A", "") else f", expected to start {start}"
            return JobState(state, f"{reason}{when}", restarts)
        return JobState(state, nodes, restarts)
    if rows:
        state, nodes, code = rows[-1]
        return JobState(state.split()[0], f"{nodes}, exit code {code}", restarts)
    return JobState("UNKNOWN", "neither squeue nor sacct knows the job")


def accounted(job_id: str) -> list[tuple[str, str, str]]:
    """State, nodes and exit code of each start of the job; empty without accounting."""
    told = ask(
        *("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates"),
        *("--jobs", job_id, "--format=State,NodeList,ExitCode"),
    )
    return [tuple(line.split("|")) for line in (told or "").splitlines()]  # type: ignore[misc]


def partitions() -> Sequence[str]:
    """Raises:
    UserError: there is no Slurm here.
    """
    return sorted(set((ask("sinfo", "--noheader", "--format=%R") or "").split()))
