"""Puts a job's folder together and hands the job to Slurm through submitit."""

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env, environment_variables

from slurm import job_states, summary
from slurm.job import Job
from slurm.records import FOLDER, Record, records
from slurm.resources import Resources
from slurm.script import CODE, make_executor
from slurm.tasks import Task
from tarflow_dist import config_file as configs
from tarflow_dist.errors import UserError
from tarflow_dist.files import lock_folder
from tarflow_dist.telemetry.environment import COMMIT_FILE, describe_environment

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tarflow_dist", "data_prep", "slurm")


def submit(chain: Sequence[Task], resources: Resources, *, command: str) -> None:
    """Submits the tasks, each to start when the one before it has finished.

    Raises:
        UserError: a job is at it already, or Slurm refuses.
    """
    home = chain[0].folder / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    with lock_folder(home):
        _refuse_second_job(chain[0])
        for task in chain:
            job = prepare(task, resources, new_folder(task))
            record = Record(
                job.folder, task.folder.absolute(), task.name, resources.attempts, command
            )
            record.write()
            record = replace(record, job_id=_send(job, resources))
            record.write()
            print(f"job {record.job_id}: {task.name}, logs in {job.folder}", flush=True)
            resources = following(resources, record.job_id)


def new_folder(task: Task) -> Path:
    """A place for a job's files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return (task.folder / FOLDER / f"{stamp}-{task.name}").absolute()


def following(resources: Resources, job_id: str) -> Resources:
    """`resources` for a job after job `job_id`, which goes if that one fails."""
    return resources.model_copy(
        update={
            "dependency": f"afterok:{job_id}",
            "slurm": {**resources.slurm, "kill-on-invalid-dep": "yes"},
        }
    )


def prepare(task: Task, resources: Resources, folder: Path) -> Job:
    """Makes the job's folder, with a copy of the code and the resolved config, which the job runs
    from whatever happens to the checkout while it waits."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / CODE / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    if commit := describe_environment()["commit"]:
        (folder / CODE / COMMIT_FILE).write_text(commit + "\n")
    if task.config is not None:
        file = folder / "config.yaml"
        file.write_text(configs.dump(task.config))
        task = replace(task, arguments=(str(file),))
    gpus = resources.gpus_per_node > 0 and not task.apart
    return Job(folder, task, gpus, summary.bytes_to_write(task))


def _send(job: Job, resources: Resources) -> str:
    """Slurm's id for the job."""
    executor = make_executor(job.task, resources, job.folder)
    try:
        with _outside_of_jobs():
            return executor.submit(job).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(job.folder)
        raise UserError(f"Slurm refuses the job: {' '.join(str(error).split())}") from error


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hides the job in which this may run; leaves what tells users' commands how to reach Slurm."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env(), environment_variables(**kept):
        yield


def _refuse_second_job(task: Task) -> None:
    for record in records(task.folder):
        if record.task == task.name and record.job_id:
            state = job_states.job_state(record.job_id)
            if state.active:
                end = shlex.join(["python", "slurm/launch.py", "stop", str(task.folder)])
                raise UserError(
                    f"job {record.job_id} ({state.state}) is at {task.folder} already: wait for "
                    f"it, or end it with {end}"
                )
