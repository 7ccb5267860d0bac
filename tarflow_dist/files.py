"""Files and folders that become visible whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tarflow_dist.errors import UserError


@contextmanager
def write_whole(file: Path) -> Iterator[Path]:
    """Yields a path beside `file` to write to; when the body ends well, it is synced to disk and
    takes the name of `file`. If the body raises, `file` is as it was before."""
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        sync(part)
        os.replace(part, file)
        sync(file.parent)
    except OSError as error:  # from a stream, it doesn't say where
        error.filename = error.filename or str(file)
        raise
    finally:
        part.unlink(missing_ok=True)


def publish_folder(part: Path, folder: Path) -> None:
    """Syncs the finished folder `part` to disk and gives it the name `folder`, replacing what may
    stand there."""
    for root, _, names in os.walk(part):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(part, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Waits until the file or folder `path` is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder` until the body ends, or this process does.

    Raises:
        UserError: another run is in there.
    """
    file = folder / ".lock"
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_at(descriptor, file):  # not one that its owner has just removed
                break
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing to {folder}: wait for it, or choose another folder"
            ) from error
        os.close(descriptor)
    try:
        yield
    finally:
        file.unlink()
        os.close(descriptor)


def _is_open_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
