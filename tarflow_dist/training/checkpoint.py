"""Checkpoints: the whole fp32 state under its own names, independent of ZeRO stage and world size.

checkpoints/00012800000/    named by the images seen
    tensors-00000.safetensors …   one file a rank, with what it held: of weights/, exp_avg/,
                              exp_avg_sq/, ema/ and buffers/NAME a piece, flattened
    state.json                RunState, the model's config, the names of its classes; the shape of
                              every tensor, and where the pieces in each file begin, by NAME; the
                              files with sizes and hashes; with a hash of its own
checkpoints/latest          the name of the newest, written last (`latest_checkpoint`)

In version 1 every tensor lay whole, and in its shape, in one of the files.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, from_saved, inside, read_sealed
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.models.classes import Classes
from tarflow_dist.training import latest_checkpoint

STATE_FILE = "state.json"
VERSION = 2
DAMAGED = (OSError, LookupError, AttributeError, TypeError, ValueError, SafetensorError)
"""What comes of reading damaged files."""
Pieces = dict[str, list[tuple[int, str]]]
"""Where each begins in its flattened tensor, and its file: in order, one after another."""
Read = Callable[[str, int, int], Tensor]
"""Gives of a KIND/NAME, flattened, the values from one index up to another."""


@dataclass
class RunState:
    """What a run must remember besides its tensors: schedules, the data's position and all random
    numbers follow from it.

    Attributes:
        images: images trained on so far, and with it the position in the order of images.
        optimizer_steps: steps that Adam has taken.
        skipped: steps left out so far, because they were not finite or their loss jumped.
        skipped_in_a_row: of these, the ones since the last step that was taken.
        mean_loss: recent average of the loss, where spikes are watched for; None before the first.
        wandb_id: the run's id at Weights & Biases; empty before it has one.
        data: the fingerprint of the images that it is trained on; empty if it isn't known.
        groups: into which the order of images deals the set; 1 before there were any.
        val_loss: the held-out loss at just this point, if it was measured here and is finite.
        rows_hash: of the rows of metrics up to here; empty if it isn't known.
    """

    images: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    mean_loss: float | None = None
    wandb_id: str = ""
    data: str = ""
    groups: int = 1
    rows_hash: str = ""
    val_loss: float | None = None

    def passed(self, every: int | None, batch_size: int) -> bool:
        """Whether the last step, of `batch_size` images, reached a multiple of `every`."""
        if every is None:
            return False
        return self.images // every > (self.images - batch_size) // every


class Piece(NamedTuple):
    """A range of values of one tensor, flattened, and of all that is kept beside it."""

    name: str
    shape: torch.Size
    """Of the whole tensor."""
    start: int
    values: dict[str, Tensor]
    """By kind (weights, ema, …)."""


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
            self._paths = {name: inside(folder, name) for name in self._described}
            self._opened: dict[str, Any] = {}
            if "shapes" in content:
                self._shapes: dict[str, list[int]] = content["shapes"]
                self._pieces = _find_pieces(content["starts"], self._shapes)
            else:
                self._shapes, self._pieces = self._find_whole_tensors()
        except DAMAGED as error:
            raise UserError(f"{folder} is not a whole checkpoint ({error})") from error

    def verify(self, some: slice = slice(None)) -> None:
        """Compares the files, or `some` of them in their order, with their hashes.

        Raises:
            UserError: a file is damaged.
        """
        for name in sorted(self._paths)[some]:
            try:
                damaged = describe(self._paths[name]) != self._described[name]
            except OSError as error:
                raise UserError(f"{self.folder} is not a whole checkpoint ({error})") from error
            if damaged:
                raise UserError(f"{self.folder} is not a whole checkpoint ({name} is damaged)")

    def read(self, key: str) -> Tensor:
        """The whole tensor `key`, such as ema/blocks.0.pos_embed, in host memory."""
        shape = self._shapes.get(key, [])
        return self.read_part(key, 0, prod(shape)).view(shape)

    def read_part(self, key: str, start: int, stop: int) -> Tensor:
        """The values of `key`, flattened, from `start` up to `stop`. No more is read than those."""
        if key not in self._shapes:
            raise UserError(f"{self.folder} lacks {key}: it is of another model")
        parts, pieces = [torch.empty(0)], self._pieces[key]
        while start < stop:
            begin, name = pieces[bisect_right(pieces, start, key=itemgetter(0)) - 1]
            try:
                piece = self._open(name).get_tensor(key).flatten()
            except DAMAGED as error:
                raise UserError(f"{self.folder / name} can't be read ({error})") from error
            if start >= begin + len(piece):
                raise UserError(f"{self.folder / name} lacks a part of {key}")
            parts.append(piece[start - begin : stop - begin])  # of a file mapped into memory
            start += len(parts[-1])
        return torch.cat(parts)

    def read_all(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind (weights, ema, buffers, …) by their parameter's name."""
        prefix = f"{kind}/"
        keys = sorted(key for key in self._shapes if key.startswith(prefix))
        return {key.removeprefix(prefix): self.read(key) for key in keys}

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = safe_open(self._paths[name], framework="pt")
        return self._opened[name]

    def _find_whole_tensors(self) -> tuple[dict[str, list[int]], Pieces]:
        """Shapes and pieces, as version 1 leaves them to the files."""
        # an open safetensors file is no mapping, but has keys()
        files = {key: name for name in self._paths for key in self._open(name).keys()}  # noqa: SIM118
        shapes = {key: self._open(name).get_slice(key).get_shape() for key, name in files.items()}
        return shapes, {key: [(0, name)] for key, name in files.items()}


def _find_pieces(starts: dict[str, dict[str, int]], shapes: dict[str, list[int]]) -> Pieces:
    """By KIND/NAME, from what is known by file and NAME.

    Raises:
        ValueError: nobody has the beginning of a tensor.
    """
    by_name = defaultdict(list)
    for file, begins in starts.items():
        for name, start in begins.items():
            by_name[name].append((start, file))
    for name, pieces in by_name.items():
        by_name[name] = sorted(pieces)
    found = {key: by_name[key.partition("/")[2]] for key in shapes}
    for key, pieces in found.items():
        if not pieces or pieces[0][0] != 0:
            raise ValueError(f"it lacks the beginning of {key}")
    return found


def open_run(path: Path) -> Checkpoint:
    """The checkpoint to take of a run's folder, which is collective, or the one that `path` itself
    is, which any rank may ask for; verified.

    Raises:
        UserError: there is none yet, or none is whole.
    """
    if not (path / latest_checkpoint.FOLDER).is_dir():
        saved = Checkpoint(path)
        saved.verify()
        return saved
    newest = newest_whole(path / latest_checkpoint.FOLDER)
    if newest is None:
        raise UserError(f"the run {path} has no checkpoint yet")
    return newest


def newest_whole(folder: Path) -> Checkpoint | None:
    """The checkpoint below `folder` to go on from, every file of it verified; None if there is none
    yet. A damaged one is named, and the one before it taken. Collective.

    Raises:
        UserError: on every rank, if all of them are damaged.
    """
    if problem := latest_checkpoint.problem(folder):
        distributed.say(problem)
    problems = []
    # rank 0 chooses: over a network folder, ranks can see different ones as the newest
    for path in distributed.from_main(latest_checkpoint.candidates(folder)):
        try:
            with distributed.together(f"{path} can't be read"):
                saved = Checkpoint(path)
                saved.verify(slice(distributed.rank(), None, distributed.world_size()))
            return saved
        except UserError as error:
            problems.append(error)
            distributed.say(f"{error}; trying the one before it")
    if problems:
        raise UserError(f"{folder} holds no whole checkpoint to go on from: {problems[0]}")
    return None
