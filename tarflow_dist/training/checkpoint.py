"""Checkpoints: the whole fp32 state under its own names, independent of ZeRO stage and world size.

checkpoints/00012800000/    named by the images seen
    tensors-00000.safetensors …   one file a writing rank; every tensor whole, in one of them:
                                  weights/, exp_avg/, exp_avg_sq/, ema/ and buffers/NAME
    state.json                    RunState, the model's config, and the files with their sizes
checkpoints/latest          the name of the newest, written last
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.errors import UserError
from tarflow_dist.files import publish_folder, sync, write_whole
from tarflow_dist.training.state import RunState

STATE_FILE = "state.json"
LATEST = "latest"
FOLDER = "checkpoints"


def save(
    folder: Path,
    tensors: Iterable[tuple[str, int, Callable[[], Tensor]]],
    state: RunState,
    *,
    model: dict[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint below `folder`, all ranks together, and deletes all but the last `keep`.

    Args:
        folder: the run's checkpoints/.
        tensors: what `Engine.tensors` yields.
        state: the run's progress.
        model: the flow's config.

    Raises:
        UserError: a rank could not write; earlier checkpoints are as they were.
    """
    name = f"{state.images:011d}"
    part = folder / f".{name}.part"
    problem = _attempt(lambda: _prepare(folder, part)) if distributed.is_main() else None
    distributed.barrier()
    file = part / f"tensors-{distributed.rank():05d}.safetensors"
    own = _own_share(tensors)
    problem = problem or _attempt(lambda: _write_tensors(own, file))
    sizes = distributed.gather((file.name, file.stat().st_size if problem is None else 0))
    problem = next(filter(None, distributed.gather(problem)), None)
    if problem is None and distributed.is_main():
        content = {"state": state.to_json(), "model": model, "files": dict(sizes)}
        problem = _attempt(lambda: _publish(part, folder / name, content))
    problem = distributed.from_main(problem)
    if problem is not None:
        if distributed.is_main():
            shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"the checkpoint {folder / name} could not be written: {problem}")
    if distributed.is_main():
        _prune(folder, name, keep)
    return folder / name


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


def _write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file)
    sync(file)


def _publish(part: Path, checkpoint: Path, content: dict[str, Any]) -> None:
    (part / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    publish_folder(part, checkpoint)
    with write_whole(checkpoint.parent / LATEST) as pointer:
        pointer.write_text(checkpoint.name + "\n")


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Deletes all but the last `keep` up to `newest`. Later ones are of a future that was given up
    when an older checkpoint was named in the pointer."""
    names = _names(folder)
    kept = [name for name in names if name <= newest][-keep:]
    for name in set(names) - set(kept):
        shutil.rmtree(folder / name, ignore_errors=True)


def _own_share(tensors: Iterable[tuple[str, int, Callable[[], Tensor]]]) -> dict[str, Tensor]:
    """Assembles every tensor with all ranks and keeps this rank's share of them, in host memory:
    each goes to the rank with the least to write so far."""
    own, load = {}, [0] * distributed.world_size()
    for key, size, assemble in tensors:
        owner = load.index(min(load))
        load[owner] += size
        tensor = assemble()
        if owner == distributed.rank():
            own[key] = tensor.detach().to("cpu", copy=True).contiguous()
    return own


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run should go on from, or None if there is none yet."""
    pointer = folder / LATEST
    # killed before the very first pointer was written, a run still has its first whole checkpoint
    names = [pointer.read_text().strip()] if pointer.exists() else _names(folder)
    return folder / names[-1] if names else None


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


class Checkpoint:
    """Reads one checkpoint.

    Attributes:
        state: the run's progress.
        model: the flow's config.

    Raises:
        UserError: something is missing or damaged.
    """

    def __init__(self, folder: Path):
        try:
            content = json.loads((folder / STATE_FILE).read_text())
            self.state = RunState.from_json(content["state"])
            self.model: dict[str, Any] = content["model"]
            self._files: dict[str, Any] = {}
            for name, size in content["files"].items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} is not {size} bytes long")
                file = safe_open(folder / name, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} is not a whole checkpoint ({error}): write the name of another one into "
                f"the file {folder.parent / LATEST}"
            ) from error
        self._folder = folder

    def read(self, key: str) -> Tensor:
        """The whole tensor `key`, such as ema/blocks.0.pos_embed, in host memory."""
        if key not in self._files:
            raise UserError(f"{self._folder} lacks {key}: it is of another model")
        return self._files[key].get_tensor(key)

    def read_all(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind (weights, ema, buffers, …) by their parameter's name."""
        prefix = f"{kind}/"
        keys = sorted(key for key in self._files if key.startswith(prefix))
        return {key.removeprefix(prefix): self.read(key) for key in keys}
