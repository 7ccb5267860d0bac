"""`launch.py status RUN` and `launch.py stop RUN`."""

import datetime
import time
from pathlib import Path

from slurm.job_record import STOP, JobRecord, ask_slurm, job_records, last_error
from tarflow_dist import config_file as configs
from tarflow_dist.errors import UserError
from tarflow_dist.telemetry.metrics_log import METRICS_FILE, read_metrics
from tarflow_dist.training import latest_checkpoint, run_folder

SHOWN = 4  # submissions
SECONDS_BETWEEN_LOOKS = 1.0
# scancel's options in each state, and what they do
ENDING = {
    "PENDING": ((), "taken from the queue"),
    "RUNNING": (("--signal=USR2",), "told to save and end"),
}


def status(run: Path) -> None:
    """Prints how a run and its jobs stand, as Slurm and the run's files have it."""
    known = job_records(run) if (run / configs.SAVED_FILE).exists() else _submitted(run)
    rows = [("run", str(run)), *_progress(run)]
    if not known:
        rows.append(("jobs", "none of Slurm's: it was started with torchrun or --local"))
    for record in known[-SHOWN:]:
        state = record.state()
        restarts = f", {state.restarts} restarts" if state.restarts else ""
        detail = f" ({state.detail})" if state.detail else ""
        rows.append((record.task, f"job {record.job_id} {state.name}{detail}{restarts}"))
        if error := last_error(record.folder):
            rows.append(("  last error", error))
        rows.append(("  logs", f"{record.folder}/{record.job_id}_*_log.{{out,err}}"))
    print("\n".join(f"{name:<16}{text}" for name, text in rows))


def stop(run: Path) -> None:
    """Ends a run's jobs: a running one saves first, a waiting one is taken from the queue."""
    stopped = False
    for record in _submitted(run):
        told: set[str] = set()
        while (state := record.state()).active:
            stopped = True
            (record.folder / STOP).touch()
            if state.name in ENDING and state.name not in told:
                options, what = ENDING[state.name]
                if ask_slurm("scancel", *options, record.job_id) is not None:
                    print(f"job {record.job_id}: {what}", flush=True)
                    told.add(state.name)
                elif record.state() == state:  # and has not just ended
                    (record.folder / STOP).unlink()
                    raise UserError(
                        f"job {record.job_id} goes on, since scancel fails: is it another user's?"
                    )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if "RUNNING" in told:
            newest = record.newest_checkpoint()
            saved = f"saved at {int(newest):,} images" if newest else "nothing to save"
            print(f"job {record.job_id}: {state.name}, {saved}")
    if not stopped:
        raise UserError(f"no job of {run} is running or waiting")


def _submitted(run: Path) -> list[JobRecord]:
    if known := job_records(run):
        return known
    raise UserError(f"no job was submitted for {run}: name a run's folder, such as runs/in256")


def _progress(run: Path) -> list[tuple[str, str]]:
    """What the run's own files say."""
    if not (run / configs.SAVED_FILE).exists():
        return []
    total = configs.load_saved(run)[0].train.images
    told = run_folder.read_status(run)
    metrics = read_metrics(run) if (run / METRICS_FILE).exists() else []
    images = int(metrics[-1]["images"]) if metrics else int(told.get("images", 0))
    rows = [("state", str(told.get("state", "not started")))]
    files = [run / name for name in (METRICS_FILE, run_folder.STATUS_FILE)]
    if written := [file.stat().st_mtime for file in files if file.exists()]:
        rows.append(
            ("last sign", f"{datetime.datetime.fromtimestamp(max(written)):%a %d %b %H:%M}")
        )
    if reason := told.get("error"):
        rows.append(("reason", str(reason)))
    rows.append(("images", f"{images:,} of {total:,} ({images / total:.1%})"))
    rates = [row["images_per_second"] for row in metrics if row.get("images_per_second")]
    if rates and told.get("state") == "running":
        rate = rates[-1]
        left = datetime.timedelta(seconds=round(max(total - images, 0) / rate))
        end = datetime.datetime.now() + left
        rows.append(("rate", f"{rate:,.1f} images/s"))
        rows.append(("ETA", f"{left}, {end:%a %d %b %H:%M}"))
    if newest := latest_checkpoint.newest(run / latest_checkpoint.FOLDER):
        rows.append(("checkpoint", str(newest)))
    return rows
