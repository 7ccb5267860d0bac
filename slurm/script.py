"""The batch script of a job, as submitit writes it."""

import shlex
import sys
from pathlib import Path

import submitit

from slurm.job import OUTCOME
from slurm.requeue import EXIT_INTERRUPTED
from slurm.resources import Resources
from slurm.tasks import JOBS, Task

CODE = "code"
# fields of Resources that are sbatch's options under the same name
PLAIN = (
    "mem",
    "partition",
    "account",
    "qos",
    "constraint",
    "nodelist",
    "exclude",
    "reservation",
    "dependency",
    "comment",
    "mail_type",
    "mail_user",
    "wckey",
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
    options |= {name: value for name in PLAIN if (value := getattr(resources, name)) is not None}
    if resources.exclusive:
        options["exclusive"] = True
    return options | resources.slurm


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
