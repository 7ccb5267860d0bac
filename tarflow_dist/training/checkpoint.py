"""Checkpoints: the whole fp32 state under its own names, independent of ZeRO stage and world size.

checkpoints/00012800000/    named by the images seen
    tensors-00000.safetensors …   one file a writing rank; every tensor whole, in one of them:
                                  weights/, exp_avg/, exp_avg_sq/, ema/ and buffers/NAME
    state.json                    RunState, the model's config, the names of its classes, and
                              the files with sizes and hashes; with a hash of its own
checkpoints/latest          the name of the newest, written last (`pointer`)
"""

import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.classes import Classes
from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, from_saved, inside, read_sealed
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.training import pointer
from tarflow_dist.training.state import RunState

STATE_FILE = "state.json"
VERSION = 1


class Checkpoint:
    """Reads one checkpoint.

    Attributes:
        folder: where it lies.
        state: the run's progress.
        model: what the flow is made of.
        classes: what its classes are called.

    Raises:
        UserError: something is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            content = read_sealed(folder / STATE_FILE, version=VERSION)
            self.state = from_saved(RunState, content["state"])
            self.model = from_saved(FlowConfig, content["model"])
            self.classes = from_saved(Classes, content.get("classes", {}))
            self._described: dict[str, dict[str, Any]] = content["files"]
            self._files: dict[str, Any] = {}
            for name, described in self._described.items():
                path = inside(folder, name)
                if path.stat().st_size != described["bytes"]:
                    raise ValueError(f"{name} is not {described['bytes']} bytes long")
                file = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
        except (
            OSError,
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
            SafetensorError,
        ) as error:
            raise UserError(f"{folder} is not a whole checkpoint ({error})") from error

    def verify(self) -> None:
        """Compares this rank's share of the files with their hashes.

        Raises:
            UserError: a file is damaged.
        """
        for name in sorted(self._described)[distributed.rank() :: distributed.world_size()]:
            if describe(self.folder / name) != self._described[name]:
                raise UserError(f"{self.folder} is not a whole checkpoint ({name} is damaged)")

    def read(self, key: str) -> Tensor:
        """The whole tensor `key`, such as ema/blocks.0.pos_embed, in host memory."""
        if key not in self._files:
            raise UserError(f"{self.folder} lacks {key}: it is of another model")
        return self._files[key].get_tensor(key)

    def read_all(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind (weights, ema, buffers, …) by their parameter's name."""
        prefix = f"{kind}/"
        keys = sorted(key for key in self._files if key.startswith(prefix))
        return {key.removeprefix(prefix): self.read(key) for key in keys}


def open_run(path: Path) -> Checkpoint:
    """The checkpoint to take of a run's folder, or the one that `path` itself is, verified.
    Collective.

    Raises:
        UserError: there is none yet, or none is whole.
    """
    if not (path / pointer.FOLDER).is_dir():
        saved = Checkpoint(path)
        saved.verify()
        return saved
    newest = newest_whole(path / pointer.FOLDER)
    if newest is None:
        raise UserError(f"the run {path} has no checkpoint yet")
    return newest


def least_val_loss(folder: Path, names: list[str]) -> str | None:
    """Which of the checkpoints `names` below `folder` has the least held-out loss, if any has."""
    losses = {}
    for name in names:
        try:
            state = read_sealed(folder / name / STATE_FILE, version=VERSION)["state"]
            losses[name] = from_saved(RunState, state).val_loss
        except (OSError, LookupError, TypeError, ValueError):
            continue  # damaged: it is named when a run would go on from it
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    return min(measured, key=lambda name: measured[name], default=None)


def newest_whole(folder: Path) -> Checkpoint | None:
    """The checkpoint below `folder` to go on from, every file of it verified; None if there is none
    yet. A damaged one is named, and the one before it taken. Collective.

    Raises:
        UserError: on every rank, if all of them are damaged.
    """
    if distributed.is_main() and (problem := pointer.problem(folder)):
        print(problem, file=sys.stderr)
    problems = []
    # rank 0 chooses: over a network folder, ranks can see different ones as the newest
    for path in distributed.from_main(pointer.candidates(folder)):
        saved, problem = _open(path)
        problem = next(filter(None, distributed.gather(problem)), None)
        if problem is None:
            assert saved is not None
            return saved
        problems.append(problem)
        if distributed.is_main():
            print(f"{problem}; trying the one before it", file=sys.stderr)
    if problems:
        raise UserError(f"{folder} holds no whole checkpoint to go on from: {problems[0]}")
    return None


def _open(folder: Path) -> tuple[Checkpoint | None, str | None]:
    try:
        saved = Checkpoint(folder)
        saved.verify()
    except UserError as error:
        return None, str(error)
    return saved, None
