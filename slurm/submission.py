"""Puts a job's folder together and hands the job to Slurm through submitit, which writes the batch
script."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env, environment_variables

from slurm.job import Job
from slurm.job_record import FOLDER, OUTCOME, JobRecord, ask_slurm, job_records
from slurm.resources import Resources, SbatchOptions
from slurm.tasks import JOBS, Task
from tarflow_dist import config_file as configs
from tarflow_dist.errors import UserError
from tarflow_dist.files import lock_folder
from tarflow_dist.telemetry.environment import COMMIT_FILE, describe_environment

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tarflow_dist", "data_prep", "slurm")
CODE = "code"  # a copy of theirs, in the job's folder


def submit(chain: Sequence[Task], *, command: str) -> None:
    """Submits the tasks, each to start when the one before it has finished.

    Raises:
        UserError: a job is at it already, or Slurm refuses.
    """
    home = chain[0].folder / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    with lock_folder(home):
        _refuse_second_job(chain[0])
        job_id = ""
        for task in chain:
            job = prepare(after(task, job_id) if job_id else task, new_folder(task))
            attempts = task.resources.attempts
            record = JobRecord(job.folder, task.folder.absolute(), task.name, attempts, command)
            record.write()
            job_id = _send(job)
            replace(record, job_id=job_id).write()
            print(f"job {job_id}: {task.name}, logs in {job.folder}", flush=True)


def check_partition(resources: Resources) -> None:
    """Raises `UserError` if there is no such partition, or no Slurm that answers."""
    told = ask_slurm("sinfo", "--noheader", "--format=%R")
    if told is None:
        raise UserError("Slurm does not answer: wait until sinfo does")
    known = sorted(set(told.split()))
    for name in (resources.partition or "").split(","):
        if name and name not in known:
            raise UserError(f"there is no partition {name}: choose among {', '.join(known)}")


def new_folder(task: Task) -> Path:
    """A place for a job's files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return (task.folder / FOLDER / f"{stamp}-{task.name}").absolute()


def after(task: Task, job_id: str) -> Task:
    """`task`, which waits for job `job_id` to finish and goes if that one fails."""
    slurm = {**task.resources.slurm, "kill-on-invalid-dep": "yes"}
    return task.asking(dependency=f"afterok:{job_id}", slurm=slurm)


def prepare(task: Task, folder: Path) -> Job:
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
    return Job(folder, task)


def _refuse_second_job(task: Task) -> None:
    for record in job_records(task.folder):
        if record.task == task.name and (state := record.state()).active:
            end = shlex.join(["python", "slurm/launch.py", "stop", str(task.folder)])
            raise UserError(
                f"job {record.job_id} ({state.name}) is at {task.folder} already: wait for it, or "
                f"end it with {end}"
            )


def _send(job: Job) -> str:
    """Slurm's id for the job."""
    executor = make_executor(job.task, job.folder)
    # the job in which this may run is hidden, but not what tells users' commands how to reach Slurm
    hidden = clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    try:
        with hidden, environment_variables(**kept):
            return executor.submit(job).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(job.folder)
        raise UserError(f"Slurm refuses the job: {' '.join(str(error).split())}") from error


class Executor(submitit.SlurmExecutor):
    """submitit's, which can also show its script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def make_executor(task: Task, folder: Path) -> Executor:
    """The executor for `task`, whose job keeps its files in `folder`."""
    resources = task.resources
    container = _container_arguments(task)
    named = {name: getattr(resources, name) for name in SbatchOptions.model_fields}
    given = {name: value for name, value in named.items() if value} | resources.slurm
    program = resources.python or ("python3" if container else sys.executable)
    python = f"env {code_first(folder)} {shlex.quote(program)} -P"
    executor = Executor(folder, python=python)
    executor.update_parameters(
        job_name=task.folder.name
        if task.folder.parent == JOBS
        else f"{task.name}-{task.folder.name}",
        nodes=resources.nodes,
        ntasks_per_node=resources.ranks_per_node,
        cpus_per_task=resources.cpus,
        gpus_per_node=resources.gpus_per_node or None,
        time=resources.minutes,
        signal_delay_s=resources.signal_delay,
        setup=[
            "trap : TERM  # meant for the ranks; this script waits for them",
            f"rm -f {shlex.quote(str(folder / OUTCOME))}",
            *environment(resources),
        ],
        srun_args=[
            "--kill-on-bad-exit=1",  # a dead rank ends the job at once
            f"--cpus-per-task={resources.cpus}",  # srun no longer takes it over from sbatch
            "--cpu-bind=none",
            *(["--gpu-bind=none"] if resources.gpus_per_node else []),
            *container,
            *resources.srun_args,
        ],
        teardown=_teardown(python, container, folder),
        wckey=None,  # submitit's own, which clusters with their own keys refuse
        additional_parameters={"requeue": True, **given},
    )
    return executor


def environment(resources: Resources) -> list[str]:
    """The shell lines that set up what the ranks run in."""
    variables = {"OMP_NUM_THREADS": "1", **resources.env}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return [*exports, *resources.setup]


def code_first(folder: Path) -> str:
    """The shell's assignment with which Python, given -P, finds the job's own copy of the code
    before all others; without -P the current folder, which is likely the checkout, comes first."""
    return f'PYTHONPATH={shlex.quote(str(folder / CODE))}"${{PYTHONPATH:+:$PYTHONPATH}}"'


def _teardown(python: str, container: list[str], folder: Path) -> list[str]:
    """The lines after srun: they requeue the job, or end it."""
    where = [shlex.join(["srun", "--nodes=1", "--ntasks=1", *container])] if container else []
    command = " ".join([*where, python, "-m slurm.requeue", shlex.quote(str(folder)), "$?"])
    return [
        command,
        "verdict=$?",
        f'[ "$verdict" = {os.EX_TEMPFAIL} ] && scontrol requeue "$SLURM_JOB_ID"',
        'exit "$verdict"',
    ]


def _container_arguments(task: Task) -> list[str]:
    if task.resources.container_image is None:
        return []
    here = Path.cwd()
    needed = [here, task.folder.resolve()]
    if task.shards and "://" not in task.shards:
        needed.append(Path(task.shards).resolve())
    if task.config is not None and task.config.init is not None:
        needed.append(task.config.init.resolve())
    seen = [path for path in needed if path == here or not path.is_relative_to(here)]
    mounts = [f"{path}:{path}" for path in seen]
    if task.resources.container_mounts:
        mounts.append(task.resources.container_mounts)
    return [
        f"--container-image={task.resources.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={here}",
    ]
