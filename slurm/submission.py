"""Puts a job's folder together and hands the job to Slurm through submitit, which writes the batch
script."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env, environment_variables

from slurm import job_states, summary
from slurm.job import OUTCOME, Job
from slurm.records import FOLDER, Record, records
from slurm.resources import Resources, SbatchOptions
from slurm.tasks import JOBS, Task
from tarflow_dist import config_file as configs
from tarflow_dist.errors import UserError
from tarflow_dist.files import lock_folder
from tarflow_dist.telemetry.environment import COMMIT_FILE, describe_environment
from tarflow_dist.train import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tarflow_dist", "data_prep", "slurm")
CODE = "code"  # a copy of theirs, in the job's folder


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


class Executor(submitit.SlurmExecutor):
    """submitit's, which can also show its script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def make_executor(task: Task, resources: Resources, folder: Path) -> Executor:
    """The executor for `task`, whose job keeps its files in `folder`."""
    cpus = resources.cpus or task.workers + 2
    gpus = 0 if task.apart else resources.gpus_per_node
    container = _container_arguments(task, resources)
    python = _python(resources.python or ("python3" if container else sys.executable), folder)
    executor = Executor(folder, python=python)
    executor.update_parameters(
        job_name=task.folder.name
        if task.folder.parent == JOBS
        else f"{task.name}-{task.folder.name}",
        nodes=resources.nodes,
        ntasks_per_node=task.ranks_a_node(resources),
        cpus_per_task=cpus,
        gpus_per_node=gpus or None,
        time=resources.minutes,
        signal_delay_s=resources.signal_delay,
        setup=_setup(resources, folder),
        srun_args=[
            "--kill-on-bad-exit=1",  # a dead rank ends the job at once
            f"--cpus-per-task={cpus}",  # srun no longer takes it over from sbatch
            "--cpu-bind=none",
            *(["--gpu-bind=none"] if gpus else []),
            *container,
            *resources.srun_args,
        ],
        teardown=_teardown(python, container, folder),
        wckey=None,  # submitit's own, which clusters with their own keys refuse
        additional_parameters=_sbatch_options(resources),
    )
    return executor


def _sbatch_options(resources: Resources) -> dict[str, str | int | bool]:
    options: dict[str, str | int | bool] = {"requeue": True}
    given = {name: getattr(resources, name) for name in SbatchOptions.model_fields}
    return options | {name: value for name, value in given.items() if value} | resources.slurm


def _setup(resources: Resources, folder: Path) -> list[str]:
    """The lines before srun."""
    environment = {"OMP_NUM_THREADS": "1", **resources.env}
    return [
        "trap : TERM  # meant for the ranks; this script waits for them",
        f"rm -f {shlex.quote(str(folder / OUTCOME))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        *resources.setup,
    ]


def _teardown(python: str, container: list[str], folder: Path) -> list[str]:
    """The lines after srun: they requeue the job, or end it."""
    where = [shlex.join(["srun", "--nodes=1", "--ntasks=1", *container])] if container else []
    command = " ".join([*where, python, "-m slurm.requeue", shlex.quote(str(folder)), "$?"])
    return [
        command,
        "verdict=$?",
        f'[ "$verdict" = {EXIT_INTERRUPTED} ] && scontrol requeue "$SLURM_JOB_ID"',
        'exit "$verdict"',
    ]


def _python(python: str, folder: Path) -> str:
    """The shell words that start Python with the job's own copy of the code before all others; -P
    keeps the current folder, which is likely the checkout, from coming first."""
    inherited = "${PYTHONPATH:+:$PYTHONPATH}"
    code = shlex.quote(str(folder / CODE))
    return f'env PYTHONPATH={code}"{inherited}" {shlex.quote(python)} -P'


def _container_arguments(task: Task, resources: Resources) -> list[str]:
    if resources.container_image is None:
        return []
    here = Path.cwd()
    needed = [here, task.folder.resolve()]
    if task.shards and "://" not in task.shards:
        needed.append(Path(task.shards).resolve())
    if task.config is not None and task.config.init is not None:
        needed.append(task.config.init.resolve())
    seen = [path for path in needed if path == here or not path.is_relative_to(here)]
    mounts = [f"{path}:{path}" for path in seen]
    if resources.container_mounts:
        mounts.append(resources.container_mounts)
    return [
        f"--container-image={resources.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={here}",
    ]
