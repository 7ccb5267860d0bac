"""What is kept of each submission: RUN/slurm/TIME-TASK/, with its code, config, logs, job.json."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tarflow_dist.errors import UserError
from tarflow_dist.files import from_saved, read_sealed, write_sealed
from tarflow_dist.training import latest_checkpoint

FOLDER = "slurm"
FILE = "job.json"
VERSION = 1
STOP = "stop"  # in a job's folder: it ends instead of being requeued
ERROR = re.compile(r"error|exception|killed|traceback", re.IGNORECASE)
# lines that only say that something else went wrong
ECHOES = re.compile(
    r"^Traceback|submitit ERROR|^slurmstepd\S*: error: \*\*\*|^srun: error: .*Exited with"
)


@dataclass(frozen=True)
class Record:
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

    @property
    def is_training(self) -> bool:
        return self.task == "train"

    def newest_checkpoint(self) -> str:
        """The name of the run's newest checkpoint; empty for none, and for tasks without."""
        newest = (
            latest_checkpoint.newest(self.run / latest_checkpoint.FOLDER)
            if self.is_training
            else None
        )
        return newest.name if newest else ""

    def write(self) -> None:
        saved = asdict(self) | {"folder": str(self.folder), "run": str(self.run)}
        write_sealed(self.folder / FILE, saved, version=VERSION)

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises `UserError` if it is damaged."""
        try:
            saved = read_sealed(folder / FILE, version=VERSION)
            return from_saved(cls, saved | {"folder": folder, "run": Path(saved["run"])})
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{folder / FILE} can't be read ({error}): remove {folder}") from error


def records(run: Path) -> list[Record]:
    """All submissions below `run`, the oldest first."""
    return [Record.read(file.parent) for file in sorted((run / FOLDER).glob(f"*/{FILE}"))]


def last_error(folder: Path) -> str:
    """The last line of a job's logs that tells of an error; empty if there is none."""
    logs = sorted(folder.glob("*_log.err"), key=lambda file: file.stat().st_mtime, reverse=True)
    for log in logs:
        for line in reversed(log.read_text(errors="replace").splitlines()[-200:]):
            if ERROR.search(line) and not ECHOES.search(line):
                return line.strip()
    return ""
