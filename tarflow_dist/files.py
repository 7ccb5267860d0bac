"""Files and folders that become visible whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
