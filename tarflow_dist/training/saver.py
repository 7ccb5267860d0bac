"""Writes checkpoints while training goes on: a copy to host memory, then the disk in a thread."""

import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.config import CheckpointConfig
from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, publish_folder, sync, write_sealed, write_tensors
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.models.classes import NAMELESS, Classes
from tarflow_dist.training import latest_checkpoint
from tarflow_dist.training.checkpoint import STATE_FILE, VERSION, Checkpoint, Piece, RunState


class _Share(NamedTuple):
    """A rank's file, as state.json has it."""

    file: str
    described: dict[str, Any]
    starts: dict[str, int]
    """Where its piece of each tensor begins, by NAME."""


class Saver:
    """Makes the checkpoints of a run, one at a time; all ranks call its methods together.

    Args:
        folder: the run's checkpoints/.
        config: how many are kept.
        model: what the flow is made of.
        classes: what its classes are called.

    Attributes:
        stall_seconds: time that training has waited for checkpoints so far.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        model: FlowConfig,
        classes: Classes = NAMELESS,
    ):
        self._folder, self._config = folder, config
        self._about = {"model": model.to_json(), "classes": asdict(classes)}
        self._share: Future[_Share] | None = None
        self.stall_seconds = 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank's share of a checkpoint is still on its way to the disk."""
        return self._share is not None and not self._share.done()

    def save(self, pieces: Iterable[Piece], state: RunState) -> None:
        """Copies what `Engine.pieces` yields and starts to write it, as of now; a checkpoint that
        is still being written is finished first. It becomes visible in `publish`.

        Raises:
            UserError: it can't be written, or the one before could not be.
        """
        self.publish()
        began = time.monotonic()
        self._checkpoint = self._folder / f"{state.images:011d}"
        self._part = self._folder / f".{self._checkpoint.name}.part"
        with distributed.together(f"the checkpoint {self._checkpoint} can't be written"):
            if distributed.is_main():
                _prepare(self._folder, self._part)
        tensors, starts, shapes = {}, {}, {}
        for piece in pieces:
            for kind, values in piece.values.items():
                key = f"{kind}/{piece.name}"
                shapes[key] = list(piece.shape)
                if values.numel():
                    starts[piece.name] = piece.start
                    tensors[key] = values.to("cpu", copy=True)
        self._content = {"state": asdict(state), **self._about, "shapes": shapes}
        file = self._part / f"tensors-{distributed.rank():05d}.safetensors"
        self._share = Future()
        # a daemon: who interrupts twice does not wait for the disk
        Thread(target=_write_share, args=(self._share, file, tensors, starts), daemon=True).start()
        self.stall_seconds += time.monotonic() - began

    def publish(self) -> None:
        """Waits until every rank has written its share, makes the checkpoint visible, moves the
        pointer to it and deletes what needs no longer be kept.

        Raises:
            UserError: a rank could not write; earlier checkpoints are as they were.
        """
        if self._share is None:
            return
        began = time.monotonic()
        shares = distributed.to_main(self._share.exception() or self._share.result())
        self._share = None
        with distributed.together(f"the checkpoint {self._checkpoint} could not be written"):
            if shares is not None:
                try:
                    self._make_visible(shares)
                except BaseException:
                    shutil.rmtree(self._part, ignore_errors=True)
                    raise
                _prune(self._checkpoint, self._config)
        self.stall_seconds += time.monotonic() - began

    def _make_visible(self, shares: list[_Share | BaseException]) -> None:
        starts, files = {}, {}
        for share in shares:
            if isinstance(share, BaseException):
                raise share
            starts[share.file], files[share.file] = share.starts, share.described
        content = {**self._content, "starts": starts, "files": files}
        write_sealed(self._part / STATE_FILE, content, version=VERSION)
        publish_folder(self._part, self._checkpoint)
        latest_checkpoint.point_to(self._checkpoint)


def _prepare(folder: Path, part: Path) -> None:
    """An empty side folder; those that killed or failed saves left are removed."""
    for left in folder.glob(".*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)


def _write_share(share: "Future[_Share]", *arguments: Any) -> None:
    try:
        share.set_result(_write(*arguments))
    except Exception as error:  # for whoever asks for the result
        share.set_exception(error)


def _write(file: Path, tensors: dict[str, Tensor], starts: dict[str, int]) -> _Share:
    write_tensors(file, tensors)
    sync(file)
    return _Share(file.name, describe(file), starts)


def _prune(newest: Path, config: CheckpointConfig) -> None:
    """Deletes all but the last ones up to `newest`, the permanent ones and the best, and those that
    were given up and the run has passed. Later ones are nobody's to delete here."""
    folder = newest.parent
    past = [name for name in latest_checkpoint.names(folder) if name <= newest.name]
    kept = set(past[-config.keep :])
    if every := config.permanent_every_images:
        first = {int(name) // every: name for name in reversed(past)}
        kept |= {name for multiple, name in first.items() if multiple}
    if config.keep_best:
        kept |= _least_val_loss(folder, past)
    old = [folder / name for name in past if name not in kept]
    for checkpoint in old + latest_checkpoint.given_up_before(newest):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _least_val_loss(folder: Path, names: list[str]) -> set[str]:
    """The one of the checkpoints `names` below `folder` with the least held-out loss, if any has
    been measured."""
    losses = {}
    for name in names:
        with suppress(UserError):  # damaged: it is named when a run would go on from it
            losses[name] = Checkpoint(folder / name).state.val_loss
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    return {min(measured, key=lambda name: measured[name])} if measured else set()
