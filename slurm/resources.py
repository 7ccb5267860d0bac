"""What a job asks of Slurm: a cluster's YAML file, and options on top of it."""

import argparse
import math
import os
import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from tarflow_dist import config_file as configs
from tarflow_dist.config import Section
from tarflow_dist.errors import UserError

CLUSTERS = Path(__file__).parent / "clusters"
CLUSTER_VARIABLE = "TARFLOW_CLUSTER"


class SbatchOptions(Section):
    """Options of sbatch, under their own names."""

    mem: str | None = None
    """Memory a node, such as 500G; 0 is all of it."""
    partition: str | None = None
    """Partition; default the cluster's."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    nodelist: str | None = None
    """Nodes that must be among the job's."""
    exclude: str | None = None
    """Nodes that must not."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    reservation: str | None = None
    """Reservation to run in."""
    dependency: str | None = None
    """Jobs to wait for, such as afterok:1234."""
    comment: str | None = None
    """Comment that Slurm keeps."""
    mail_type: str | None = None
    """Events to write a mail about, such as END,FAIL."""
    mail_user: str | None = None
    """Who gets those mails."""
    wckey: str | None = None
    """Workload characterisation key."""


class Resources(SbatchOptions):
    """Every field is a key of slurm/clusters/NAME.yaml, and an option of launch.py."""

    nodes: PositiveInt = 1
    """Nodes."""
    gpus_per_node: NonNegativeInt = 8
    """GPUs a node, one rank on each; 0 runs on CPUs."""
    tasks_per_node: PositiveInt | None = None
    """Ranks a node; default one a GPU, or one on CPUs."""
    cpus: PositiveInt | None = None
    """CPU cores a rank; default what the task's worker processes need."""
    time: str = "24:00:00"
    """Time limit as Slurm writes it: minutes, hours:minutes:seconds, days-hours. Reaching it costs
    a run nothing: it is saved and requeued."""
    signal_delay: PositiveInt = 300
    """Seconds before the time limit at which the run is saved."""
    attempts: PositiveInt = 5
    """Ends in a row at the same checkpoint after which a job is no longer requeued."""
    container_image: str | None = None
    """Container in which the ranks run (pyxis), such as /images/tarflow.sqsh."""
    container_mounts: str | None = None
    """FROM:TO,… that the container sees besides the current folder and the run's."""
    python: str | None = None
    """Python of the ranks; default the one that runs launch.py, in a container python3."""
    setup: list[str] = Field(default=[])
    """Shell lines before the ranks start, such as module load cuda."""
    env: dict[str, str] = Field(default={})
    """Environment variables of the job."""
    srun_args: list[str] = Field(default=[])
    """More arguments of srun."""
    gpu: str = "h100"
    """The GPUs, for the estimate of memory and speed; the names are tarflow_dist.plan's."""
    network: str | None = None
    """The network between the nodes, for the estimate of what a step waits for: GB/s that a node
    sends, such as 45, or its cards and their Gb/s, such as 2x200."""
    slurm: dict[str, str | int | bool] = Field(default={})
    """More options of sbatch; those without a value are true."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        limit = parse_minutes(self.time)
        if self.signal_delay >= limit * 60:
            raise ValueError(
                f"signal_delay {self.signal_delay} s is not shorter than time {self.time}"
            )
        if self.gpus_per_node and (self.tasks_per_node or self.gpus_per_node) > self.gpus_per_node:
            raise ValueError(
                f"tasks_per_node {self.tasks_per_node} is more than gpus_per_node "
                f"{self.gpus_per_node}"
            )
        return self

    def with_workers(self, count: int) -> Self:
        """With cores for `count` worker processes a rank, unless their number was given."""
        return self.model_copy(update={"cpus": self.cpus or count + 2})

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def minutes(self) -> int:
        return parse_minutes(self.time)


def parse_minutes(time: str) -> int:
    """Slurm's minutes, m:s, h:m:s, d-h, d-h:m and d-h:m:s as minutes, rounded up."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ValueError(f"time {time!r} is not Slurm's: write such as 24:00:00 or 2-00 (two days)")
    units = (60, 1, 1 / 60) if dash or len(parts) == 3 else (1, 1 / 60)
    amount = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    minutes = math.ceil(int(days or 0) * 24 * 60 + amount)
    if minutes < 1:
        raise ValueError(f"time {time!r} leaves no time at all")
    return minutes


def add_options(parser: argparse._ActionsContainer) -> None:
    """An option for each field, and --cluster."""
    known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
    parser.add_argument(
        "--cluster",
        default=os.environ.get(CLUSTER_VARIABLE),
        help=f"defaults for the options below: a YAML file, or the name of one in slurm/clusters/ "
        f"({known}); also the environment variable {CLUSTER_VARIABLE}",
    )
    for name, field in Resources.model_fields.items():
        text = " ".join((field.description or "").split()).replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        default: Any = field.default
        if isinstance(default, bool):
            parser.add_argument(flag, dest=name, action="store_true", default=None, help=text)
        elif isinstance(default, dict | list):
            metavar = "LINE" if isinstance(default, list) else "NAME=VALUE"
            text += " Again for another."
            parser.add_argument(flag, dest=name, action="append", metavar=metavar, help=text)
        else:
            shown = text if default is None else f"{text} Default {default}."
            parser.add_argument(flag, dest=name, metavar=name.upper(), help=shown)


def read_options(arguments: argparse.Namespace) -> Resources:
    """The cluster's file with the options given on top of it.

    Raises:
        UserError: one sentence that names the key.
    """
    tree = _read_cluster(arguments.cluster) if arguments.cluster else {}
    for name, field in Resources.model_fields.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        before = tree.get(name, field.default)
        if isinstance(field.default, dict):
            value = dict(_pair(name, text) for text in value)
            value = before | value if isinstance(before, dict) else before
        elif isinstance(field.default, list):
            value = before + value if isinstance(before, list) else before
        tree[name] = value  # what the file has of another kind is told now
    try:
        return Resources.model_validate(tree)
    except ValidationError as error:
        raise UserError(_first_problem(error, arguments.cluster)) from error


def _pair(name: str, text: str) -> tuple[str, str | bool]:
    key, equals, value = text.partition("=")
    if key and not equals and name == "slurm":
        return key, True  # an option without a value, such as hold
    if not key or not equals:
        raise UserError(f"--{name} {text} should look like NAME=VALUE")
    return key, value


def _read_cluster(name: str) -> dict[str, Any]:
    file = Path(name) if name.endswith(".yaml") else CLUSTERS / f"{name}.yaml"
    try:
        return configs.read_yaml(file, "partition and time")
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise UserError(
            f"there is no cluster file {file}: write one, or choose among {known}"
        ) from error


def _first_problem(error: ValidationError, cluster: str | None) -> str:
    problem = configs.first_problem(error, [*Resources.model_fields])
    if problem.startswith("unknown key"):
        return f"cluster {cluster}: {problem}"
    hint = "(YAML reads 24:00:00 as a number: put it in quotes)"
    return f"{problem} {hint}" if problem.startswith("time is") else problem
