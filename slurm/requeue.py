"""Decides, when the ranks of a job have ended, how it goes on: python -m slurm.requeue FOLDER CODE

FOLDER is the job's, CODE what srun ended with. Runs in the batch script, and exits with 75 if that
should requeue the job. Loads no torch.
"""

import json
import os
import sys
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from slurm.job_record import STOP, JobRecord, last_error, read_outcome
from tarflow_dist.errors import UserError
from tarflow_dist.training import run_folder

ENDS = "ends.jsonl"


def main(argv: list[str]) -> int:
    folder, code = Path(argv[0]), int(argv[1])
    record = JobRecord.read(folder)
    outcome = read_outcome(folder) or _killed(folder, code)
    state, reason = outcome["state"], outcome["reason"]
    end = {
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "checkpoint": record.newest_checkpoint(),
        **outcome,
    }
    with (folder / ENDS).open("a") as file:
        file.write(json.dumps(end) + "\n")
    if state == "finished":
        return 0
    if state == "refused":
        _note_failure(record.run, reason)
        return 2
    if (folder / STOP).exists():
        print("stopped as asked; the same launch command goes on", file=sys.stderr)
        return 1
    without_progress = _ends_without_progress(record)
    if without_progress >= record.attempts:
        at = f"checkpoint {end['checkpoint']}" if end["checkpoint"] else "no checkpoint yet"
        _note_failure(
            record.run,
            f"ended {without_progress} times in a row without progress ({at}), last: "
            f"{reason or state}",
        )
        return 1
    print(f"{state}, to be requeued{': ' if reason else ''}{reason}", file=sys.stderr)
    return os.EX_TEMPFAIL


def _killed(folder: Path, code: int) -> dict[str, Any]:
    """What can be told of ranks that were killed before they noted an outcome."""
    signal = f" (signal {code - 128})" if code > 128 else ""
    said = last_error(folder)
    reason = f"srun ended with {code}{signal}{': ' if said else ''}{said}"
    return {"state": "crashed", "reason": reason}


def _ends_without_progress(record: JobRecord) -> int:
    """How often in a row the job has ended at the checkpoint that it ended at now. What has no
    checkpoints may be interrupted as often as Slurm likes."""
    ends: list[dict[str, Any]] = []
    for line in (record.folder / ENDS).read_text(errors="replace").splitlines():
        with suppress(ValueError):  # what a lost disk left of one
            ends.append({"checkpoint": None, "state": None} | json.loads(line))
    now = ends[-1]["checkpoint"]
    there = takewhile(lambda end: end["checkpoint"] == now, reversed(ends))
    return sum(record.task == "train" or end["state"] == "crashed" for end in there)


def _note_failure(run: Path, reason: str) -> None:
    """Adds state and reason to the run's status.json."""
    try:
        status = run_folder.read_status(run)
    except UserError:
        status = {}
    run_folder.write_status(run, status | {"state": "failed", "error": reason})
    print(f"given up: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
