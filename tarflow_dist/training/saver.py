"""Writes checkpoints while training goes on: a copy to host memory, then the disk in a thread."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.config import CheckpointConfig
from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, grant, publish_folder, sync, write_sealed
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.models.classes import NAMELESS, Classes
from tarflow_dist.training import latest_checkpoint
from tarflow_dist.training.checkpoint import STATE_FILE, VERSION, Piece, least_val_loss
from tarflow_dist.training.state import RunState


class Saver:
    """Makes the checkpoints of a run, one at a time; all ranks call its methods together.

    Args:
        folder: the run's checkpoints/.
        config: how many are kept, and what happens when one can't be written.
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
        self._writer: _Writer | None = None
        self.stall_seconds = 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank's share of a checkpoint is still on its way to the disk."""
        return self._writer is not None and self._writer.is_alive()

    def save(self, pieces: Iterable[Piece], state: RunState) -> None:
        """Copies what `Engine.pieces` yields and starts to write it, as of now; a checkpoint that
        is still being written is finished first. It becomes visible in `publish` or `finish`.

        Raises:
            UserError: the one before could not be written, and the config says to stop then.
        """
        began = time.monotonic()
        self.publish()
        part = self._folder / f".{state.images:011d}.part"
        problem = _attempt(lambda: _prepare(self._folder, part)) if distributed.is_main() else None
        problem = distributed.from_main(problem)
        self._writer = _Writer(part, {"state": asdict(state), **self._about}, problem)
        for piece in pieces:
            self._writer.add(piece)
        self._writer.start()
        self.stall_seconds += time.monotonic() - began

    def publish(self) -> None:
        """Waits until every rank has written its share, makes the checkpoint visible, moves the
        pointer to it and deletes what needs no longer be kept.

        Raises:
            UserError: a rank could not write, and the config says to stop then; earlier checkpoints
                are as they were.
        """
        problem = self._publish()
        if problem is None:
            return
        if self._config.on_failure == "stop":
            raise UserError(problem)
        if distributed.is_main():
            print(f"{problem}; training goes on", file=sys.stderr)

    def finish(self) -> None:
        """The same at the run's end, where not to be able to write is always an error."""
        problem = self._publish()
        if problem is not None:
            raise UserError(problem)

    def _publish(self) -> str | None:
        writer, self._writer = self._writer, None
        if writer is None:
            return None
        began = time.monotonic()
        writer.join()
        share = (writer.file.name, writer.described, writer.starts, writer.problem)
        shares = distributed.to_main(share)
        part, checkpoint = writer.part, self._folder / writer.part.name.strip(".").split(".")[0]
        problem = None
        if shares is not None:
            problem = next((problem for *_, problem in shares if problem), None)
            if problem is None:
                files = {name: described for name, described, *_ in shares}
                starts = {name: starts for name, _, starts, _ in shares}
                index = {"shapes": writer.shapes, "starts": starts, "files": files}
                content = writer.content | index
                problem = _attempt(lambda: _make_visible(part, checkpoint, content))
            if problem is None:
                _prune(checkpoint, self._config)
            else:
                shutil.rmtree(part, ignore_errors=True)
        problem = distributed.from_main(problem)
        self.stall_seconds += time.monotonic() - began
        return problem and f"the checkpoint {checkpoint} could not be written: {problem}"


class _Writer(Thread):
    """Writes one rank's share of a checkpoint."""

    def __init__(self, part: Path, content: dict[str, Any], problem: str | None):
        super().__init__(name="checkpoint", daemon=True)
        self.part, self.content, self.problem = part, content, problem
        self.file = part / f"tensors-{distributed.rank():05d}.safetensors"
        self.described: dict[str, Any] = {}
        self.starts: dict[str, int] = {}
        self.shapes: dict[str, list[int]] = {}
        self._tensors: dict[str, Tensor] = {}

    def add(self, piece: Piece) -> None:
        """Copies it to host memory."""
        for kind, values in piece.values.items():
            key = f"{kind}/{piece.name}"
            self.shapes[key] = list(piece.shape)
            if values.numel():
                self.starts[piece.name] = piece.start
                self._tensors[key] = values.to("cpu", copy=True)

    def run(self) -> None:
        self.problem = self.problem or _attempt(self._write)
        self._tensors = {}

    def _write(self) -> None:
        save_file(self._tensors, self.file)
        grant(self.file)
        sync(self.file)
        self.described = describe(self.file)


def _attempt(action: Callable[[], None]) -> str | None:
    """What went wrong with the disk, if anything: all ranks must hear of it before one raises."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _prepare(folder: Path, part: Path) -> None:
    """An empty side folder; those that killed or failed saves left are removed."""
    for left in folder.glob(".*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)


def _make_visible(part: Path, checkpoint: Path, content: dict[str, Any]) -> None:
    write_sealed(part / STATE_FILE, content, version=VERSION)
    publish_folder(part, checkpoint)
    latest_checkpoint.point_to(checkpoint)


def _prune(newest: Path, config: CheckpointConfig) -> None:
    """Deletes all but the last ones up to `newest`, the permanent ones and the best, and those that
    were given up and the run has passed. Later ones are nobody's to delete here."""
    folder = newest.parent
    past = [name for name in latest_checkpoint.names(folder) if name <= newest.name]
    kept = set(past[-config.keep :])
    if every := config.permanent_every_images:
        first = {int(name) // every: name for name in reversed(past)}
        kept |= {name for multiple, name in first.items() if multiple}
    if config.keep_best and (best := least_val_loss(folder, past)):
        kept.add(best)
    old = [folder / name for name in past if name not in kept]
    for checkpoint in old + latest_checkpoint.given_up_before(newest):
        shutil.rmtree(checkpoint, ignore_errors=True)
