"""A run that starts from a model (`init`): its weights, and what becomes of its classes.

A class that both know by name keeps its embedding. Another one starts at the mean of the model's
embeddings, where the model puts an image without a label, plus the noise that all embeddings start
with; so does the unlabelled pass of a run without classes.
"""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.config import Config
from tarflow_dist.errors import UserError
from tarflow_dist.flow.condition import EMBEDDING_STD
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.models import hub
from tarflow_dist.models.classes import Classes, some
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.training import latest_checkpoint
from tarflow_dist.training.checkpoint import Read, open_run

NOISE = ("noise", "sigma", "sigma_range")
"""Fields in which a run may differ from the model it starts from, as in its classes."""


def warm_start(config: Config, classes: Classes) -> tuple[Read, list[str]]:
    """What a run of `config`, whose data have these `classes`, starts with. Collective.

    Returns:
        A function as `Engine.load` reads from, and sentences on what is new or differs.

    Raises:
        UserError: `config.init` is no model, or one whose weights can't be taken.
    """
    assert config.init is not None
    source, model = _open(config.init)
    _check(source, model.config, config.model)
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    said = [f"its weights are those of {source}"]
    kept = _kept_classes(model.classes, classes)
    for t in range(config.model.num_blocks):
        _take_classes(weights, t, config, kept)
    if config.model.num_classes:
        said.append(_say_classes(source, model, config.model.num_classes, classes, kept))
    for name in NOISE:
        there, here = getattr(model.config, name), getattr(config.model, name)
        if there != here:
            said.append(f"its {name} is {here}, there it was {there}")

    def read(key: str, start: int, stop: int) -> Tensor:
        kind, _, name = key.partition("/")
        part = weights[name].flatten()[start:stop]
        return torch.zeros_like(part) if kind.startswith("exp_avg") else part

    return read, said


def _open(path: Path) -> tuple[str, TarFlow]:
    """The model at `path` or of that name at the hub, or a run's newest moving average, and its
    path or its name.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not latest_checkpoint.is_run(path):
        found = hub.find_on_all_ranks(path)
        return found.name, TarFlow.from_pretrained(found.folder, calibrated=False)
    saved = open_run(path)
    weights = saved.read_all("ema") | saved.read_all("buffers")
    flow = TarFlow.with_weights(saved.model, weights, source=path)
    flow.classes = saved.classes
    return str(path), flow


def _check(source: str, theirs: FlowConfig, mine: FlowConfig) -> None:
    def of(flow: FlowConfig, name: str) -> object:
        return flow.layers if name == "layers_per_block" else getattr(flow, name)

    free = ("num_classes", *NOISE)
    names = [field.name for field in fields(FlowConfig) if field.name not in free]
    other = [name for name in names if of(theirs, name) != of(mine, name)]
    if (theirs.sigma_range is None) != (mine.sigma_range is None):
        other.append("sigma_range")
    if other:
        differences = ", ".join(
            f"{name} {getattr(theirs, name)} and not {getattr(mine, name)}" for name in other
        )
        raise UserError(
            f"init: {source} has {differences}: give model.… its values, or init another model"
        )


def _kept_classes(theirs: Classes, mine: Classes) -> dict[int, int]:
    """The classes that go by one name in both: mine → theirs. A name that two classes have tells
    nothing."""
    known = {name: i for i, name in enumerate(theirs.names) if theirs.names.count(name) == 1}
    return {
        i: known[name]
        for i, name in enumerate(mine.names)
        if name in known and mine.names.count(name) == 1
    }


def _take_classes(
    weights: dict[str, Tensor], block: int, config: Config, kept: dict[int, int]
) -> None:
    """Makes a block's class embeddings those of the run's classes."""
    key, positions = f"blocks.{block}.class_embed", f"blocks.{block}.pos_embed"
    theirs = weights.pop(key, None)
    no_class = torch.zeros(1, config.model.width) if theirs is None else theirs.mean(dim=0)
    if not config.model.num_classes:
        weights[positions] = weights[positions] + no_class
        return
    noise = rng.normal(
        (1, config.model.width),
        seed=config.seed,
        purpose=f"class embedding {block}",
        index=torch.arange(config.model.num_classes),
    )
    mine = no_class + EMBEDDING_STD * noise.float()
    if theirs is not None and kept:
        mine[list(kept)] = theirs[list(kept.values())]
    weights[key] = mine


def _say_classes(
    source: str, model: TarFlow, count: int, classes: Classes, kept: dict[int, int]
) -> str:
    if len(kept) == count:
        return "so are all its classes, by their names"
    new = [name for i, name in enumerate(classes.names) if i not in kept]
    if kept:
        return f"so are {len(kept)} of its {count} classes, by their names; new: {some(new)}"
    if model.config.num_classes and not model.classes.names:
        return f"all its classes are new: {source} doesn't say what its own are called"
    return "all its classes are new"
