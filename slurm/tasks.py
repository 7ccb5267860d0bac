"""The commands that can be launched, each checked as far as can be before it is submitted."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurm.resources import Resources
from tarflow_dist import config_file as configs
from tarflow_dist.config import Config
from tarflow_dist.errors import UserError

MODULES = {
    "train": "tarflow_dist.train",
    "sample_fid": "tarflow_dist.sample_fid",
    "evaluate_bpd": "tarflow_dist.evaluate_bpd",
    "data_prep": "data_prep.__main__",
}
DATA_OPTIONS = {"sample_fid": "reference", "evaluate_bpd": "data"}
JOBS = Path("jobs")  # where tasks without a run keep what belongs to their jobs

PREPARATION_WORKERS = 7
"""Processes that a data_prep gets cores for, unless it names a number."""


@dataclass(frozen=True)
class Task:
    """A command for all ranks.

    Attributes:
        name: a key of `MODULES`.
        arguments: its command line; training's is the resolved config.
        folder: what `launch.py status` is asked about: the run's folder, or one below `JOBS`.
        resources: what its job asks for.
        shards: the data it reads, a folder or an address.
        config: the run that is trained.
        of_run: it comes after the training of `folder`, and its model is converted from there.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    resources: Resources
    shards: str | None = None
    config: Config | None = None
    of_run: bool = False

    def asking(self, **changes: Any) -> "Task":
        """The task with other resources."""
        return replace(self, resources=self.resources.model_copy(update=changes))


def make(name: str, arguments: Sequence[str], resources: Resources) -> Task:
    """The task `name` with its command line.

    Raises:
        UserError: an option or the config is wrong, or a path leads nowhere.
    """
    if name == "train":
        return _training(arguments, resources)
    if name == "data_prep":
        return _preparation(arguments, resources)
    parsed = _parse_evaluation(name, arguments)
    measured = parsed.model or parsed.samples
    folder = JOBS / f"{name}-{measured.resolve().name}"
    shards = str(getattr(parsed, DATA_OPTIONS[name]))
    return Task(name, tuple(arguments), folder, resources.with_workers(0), shards)


def after_training(line: str, train: Task, resources: Resources) -> Task:
    """The task of --then: `sample_fid` or `evaluate_bpd` with its options, of the trained model on
    the run's data.

    Raises:
        UserError: another task, or a wrong option.
    """
    try:
        name, *arguments = shlex.split(line) or [""]
    except ValueError as error:
        raise UserError(f"--then {line}: {str(error).lower()}") from error
    if name not in DATA_OPTIONS:
        raise UserError(f"--then {name!r}: only sample_fid or evaluate_bpd can come after training")
    if any(word.partition("=")[0] == "--model" for word in arguments):
        raise UserError(f"--then {name}: its model is the one that is trained, leave --model out")
    data = f"--{DATA_OPTIONS[name]}"
    if data not in arguments:
        arguments = [data, str(train.shards), *arguments]
    _parse_evaluation(name, ["--model", ".", *arguments])  # any folder: the model isn't there yet
    resources = resources.with_workers(0)
    return Task(name, tuple(arguments), train.folder, resources, train.shards, of_run=True)


def _training(arguments: Sequence[str], resources: Resources) -> Task:
    if not arguments:
        raise UserError("CONFIG is missing: give a YAML file, such as configs/in256.yaml")
    config = configs.load(Path(arguments[0]), arguments[1:])
    resources = resources.with_workers(config.data.num_workers)
    return Task("train", (), config.run, resources, config.data.path, config)


def _preparation(arguments: Sequence[str], resources: Resources) -> Task:
    """Its ranks need no GPU, have workers of their own and share the shards."""
    from data_prep.commands import parse

    resources = resources.model_copy(update={"gpus_per_node": 0})
    parsed = parse(list(arguments), world_size=resources.world_size)
    name = str(getattr(parsed, "out", parsed.command)).rstrip("/").rpartition("/")[2]
    resources = resources.with_workers(getattr(parsed, "workers", None) or PREPARATION_WORKERS)
    return Task("data_prep", tuple(arguments), JOBS / f"data_prep-{name}", resources)


def _parse_evaluation(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    from tarflow_dist import evaluate_bpd, sample_fid

    if name == "evaluate_bpd":
        return evaluate_bpd.parse_arguments(list(arguments))
    parsed = sample_fid.parse_arguments(list(arguments))
    sample_fid.check_arguments(parsed)
    return parsed
