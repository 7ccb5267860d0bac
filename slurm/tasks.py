"""The commands that can be launched, each checked as far as can be before it is submitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
        shards: the data it reads, a folder or an address.
        workers: processes of its own a rank.
        config: the run that is trained.
        of_run: it comes after the training of `folder`, and its model is converted from there.
        apart: its ranks need no GPU, and none waits for another to compute.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    shards: str | None = None
    workers: int = 0
    config: Config | None = None
    of_run: bool = False
    apart: bool = False

    def ranks_a_node(self, resources: Resources) -> int:
        return (resources.tasks_per_node or 1) if self.apart else resources.ranks_per_node


def training(arguments: Sequence[str]) -> Task:
    """From CONFIG [key=value …].

    Raises:
        UserError: the config is missing or wrong.
    """
    if not arguments:
        raise UserError("CONFIG is missing: give a YAML file, such as configs/in256.yaml")
    config = configs.load(Path(arguments[0]), arguments[1:])
    return Task("train", (), config.run, config.data.path, config.data.num_workers, config=config)


def evaluation(name: str, arguments: Sequence[str]) -> Task:
    """sample_fid or evaluate_bpd with a model of their own.

    Raises:
        UserError: an option is wrong, or a path leads nowhere.
    """
    from tarflow_dist import evaluate_bpd, sample_fid

    if name == "sample_fid":
        sampling = sample_fid.parse_arguments(list(arguments))
        sample_fid.check_arguments(sampling)
        model, shards = sampling.model, sampling.reference
    else:
        likelihood = evaluate_bpd.parse_arguments(list(arguments))
        model, shards = likelihood.model, likelihood.data
    return Task(name, tuple(arguments), JOBS / f"{name}-{model.resolve().name}", str(shards))


def preparation(arguments: Sequence[str], resources: Resources) -> Task:
    """data_prep, whose ranks have workers of their own and share the shards.

    Raises:
        UserError: an option is wrong, or can't be for so many ranks.
    """
    from data_prep.commands import parse

    ranks = resources.nodes * (resources.tasks_per_node or 1)
    parsed = parse(list(arguments), world_size=ranks)
    name = str(getattr(parsed, "out", parsed.command)).rstrip("/").rpartition("/")[2]
    workers = getattr(parsed, "workers", None) or PREPARATION_WORKERS
    folder = JOBS / f"data_prep-{name}"
    return Task("data_prep", tuple(arguments), folder, workers=workers, apart=True)


def after_training(words: Sequence[str], train: Task) -> Task:
    """The task of --then: `sample_fid` or `evaluate_bpd` with its options, of the trained model on
    the run's data.

    Raises:
        UserError: another task, or a wrong option.
    """
    name, *arguments = words or [""]
    data = {"sample_fid": "--reference", "evaluate_bpd": "--data"}.get(name)
    if data is None:
        raise UserError(f"--then {name!r}: only sample_fid or evaluate_bpd can come after training")
    if "--model" in arguments:
        raise UserError(f"--then {name}: its model is the one that is trained, leave --model out")
    if data not in arguments:
        arguments = [data, str(train.shards), *arguments]
    evaluation(name, ["--model", ".", *arguments])  # any folder: the model isn't there yet
    return Task(name, tuple(arguments), train.folder, train.shards, of_run=True)


def make(name: str, arguments: Sequence[str], resources: Resources) -> Task:
    """The task `name` with its command line."""
    if name == "train":
        return training(arguments)
    return preparation(arguments, resources) if name == "data_prep" else evaluation(name, arguments)
