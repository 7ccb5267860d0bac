"""Which of a run's checkpoints it goes on from. Loads no torch.

checkpoints/latest names the newest one. The name is followed where such a checkpoint is there, so
that a run can be sent back on purpose; anything else in it is named and passed over. A checkpoint
that a run goes back behind is given up by its name, NAME.given-up, and deleted when the run has
passed it: nothing is ever deleted for what the pointer says.
"""

import os
import shutil
import sys
from pathlib import Path

from tarflow_dist.files import NotRegularError, read_regular, write_whole

FOLDER = "checkpoints"
LATEST = "latest"
GIVEN_UP = ".given-up"


def is_run(path: Path) -> bool:
    """Whether `path` is a run's folder, or one of its checkpoints."""
    is_folder = (path / "config.yaml").is_file() and (path / FOLDER).is_dir()
    return is_folder or (path / "state.json").is_file()


def names(folder: Path) -> list[str]:
    """All checkpoints below `folder`, in their order."""
    return _numbered(folder, "")


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run should go on from, or None if there is none yet."""
    return next(iter(candidates(folder)), None)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints below `folder` that a run could go on from, the best first: the one that the
    pointer names, then those before it; all of them where it names none."""
    found = names(folder)
    pointed = _read(folder / LATEST)
    if pointed in found:
        found = found[: found.index(pointed) + 1]
    return [folder / name for name in reversed(found)]


def problem(folder: Path) -> str | None:
    """What is wrong with the pointer below `folder`, in a sentence; None if nothing is."""
    pointer, found = folder / LATEST, names(folder)
    # killed before the very first pointer was written, a run still has its first checkpoint
    if not found or not os.path.lexists(pointer) or (pointed := _read(pointer)) in found:
        return None
    said = "is no file" if pointed is None else f"names no checkpoint that is there ({pointed!r})"
    return f"{pointer} {said}: the newest whole checkpoint is taken"


def point_to(checkpoint: Path) -> None:
    """Has the pointer name `checkpoint`."""
    with write_whole(checkpoint.parent / LATEST) as part:
        part.write_text(checkpoint.name + "\n")


def give_up_after(checkpoint: Path) -> None:
    """Records that the run goes on from `checkpoint` and gives up all later ones."""
    folder = checkpoint.parent
    for name in names(folder):
        if name > checkpoint.name:
            given_up = folder / f"{name}{GIVEN_UP}"
            shutil.rmtree(given_up, ignore_errors=True)  # of an earlier future
            os.rename(folder / name, given_up)
            print(f"{folder / name} is given up, and kept as {given_up.name}", file=sys.stderr)
    if _read(folder / LATEST) != checkpoint.name:
        point_to(checkpoint)


def given_up_before(checkpoint: Path) -> list[Path]:
    """Those that were given up and that the run has passed since."""
    found = _numbered(checkpoint.parent, GIVEN_UP)
    return [checkpoint.parent / f"{name}{GIVEN_UP}" for name in found if name <= checkpoint.name]


def _numbered(folder: Path, suffix: str) -> list[str]:
    if not folder.is_dir():
        return []
    entries = (p for p in folder.iterdir() if p.name.endswith(suffix) and p.is_dir())
    return sorted(n for p in entries if (n := p.name.removesuffix(suffix)).isdecimal())


def _read(pointer: Path) -> str | None:
    """What the pointer says, which may be anything; None if it is no file."""
    try:
        return read_regular(pointer)[:64].decode(errors="replace").strip()
    except (FileNotFoundError, NotRegularError):
        return None
