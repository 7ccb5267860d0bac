"""Checkpoints: the whole fp32 state under its own names, independent of ZeRO stage and world size.

checkpoints/00012800000/    named by the images seen
    tensors-00000.safetensors …   one file a writing rank; every tensor whole, in one of them:
                                  weights/, exp_avg/, exp_avg_sq/, ema/ and buffers/NAME
    state.json                    RunState, the model's config, and the files with sizes and hashes
checkpoints/latest          the name of the newest, written last
"""

import json
import sys
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.errors import UserError
from tarflow_dist.training.state import RunState

STATE_FILE = "state.json"
LATEST = "latest"
FOLDER = "checkpoints"
HASH_CHUNK = 2**24


def candidates(folder: Path) -> list[Path]:
    """The checkpoints below `folder` that a run could go on from, the best first: the one that the
    pointer names, then those before it."""
    pointer = folder / LATEST
    found = names(folder)
    # killed before the very first pointer was written, a run still has its first whole checkpoint
    newest = pointer.read_text().strip() if pointer.exists() else (found or [""])[-1]
    older = [name for name in reversed(found) if name < newest]
    return [folder / name for name in [newest, *older] if name]


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run should go on from, or None if there is none yet."""
    return next(iter(candidates(folder)), None)


def names(folder: Path) -> list[str]:
    """All checkpoints below `folder`, in their order."""
    return sorted(p.name for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def describe_file(file: Path) -> dict[str, Any]:
    """Size and hash of one of a checkpoint's files."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "xxh3_128": digest.hexdigest()}


class Checkpoint:
    """Reads one checkpoint.

    Attributes:
        folder: where it lies.
        state: the run's progress.
        model: the flow's config.

    Raises:
        UserError: something is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            content = json.loads((folder / STATE_FILE).read_text())
            self.state = RunState.from_json(content["state"])
            self.model: dict[str, Any] = content["model"]
            self._described: dict[str, dict[str, Any]] = content["files"]
            self._files: dict[str, Any] = {}
            for name, described in self._described.items():
                if (folder / name).stat().st_size != described["bytes"]:
                    raise ValueError(f"{name} is not {described['bytes']} bytes long")
                file = safe_open(folder / name, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} is not a whole checkpoint ({error})") from error

    def verify(self) -> None:
        """Compares this rank's share of the files with their hashes.

        Raises:
            UserError: a file is damaged.
        """
        for name in sorted(self._described)[distributed.rank() :: distributed.world_size()]:
            if describe_file(self.folder / name) != self._described[name]:
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


def newest_whole(folder: Path) -> Checkpoint | None:
    """The checkpoint below `folder` to go on from, every file of it verified; None if there is none
    yet. A damaged one is named, and the one before it taken. Collective.

    Raises:
        UserError: on every rank, if all of them are damaged.
    """
    problems = []
    # rank 0 chooses: over a network folder, ranks can see different ones as the newest
    for path in distributed.from_main(candidates(folder)):
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
