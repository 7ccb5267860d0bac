"""What an unfinished run has done so far, so that it can be killed at any moment and continued.

A staging folder: `begun.json` says what the run is, `images.bin` is the stored images one after
another, `images.jsonl` a line an item of the source, in its order. Images are on disk before their
lines are, and a line counts once it is whole; each ends with a hash of itself and all before it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_hexdigest

from data_prep.encode import Rejected, Result
from data_prep.sources import Item
from tarflow_dist.errors import UserError
from tarflow_dist.files import open_regular, read_json, write_whole

COMMIT_EVERY = 256  # images; at most so many are done again
SEAL = ', "hash": "%s"}\n'  # what a line ends with
SEAL_LENGTH = len(SEAL % xxh3_64_hexdigest(b""))


def damaged(folder: Path) -> UserError:
    return UserError(f"{folder} is damaged: remove it to start over")


class Journal:
    """A file of JSON lines that is only ever added to. What a kill left of a last line is dropped.

    Attributes:
        lines: that were there when it was opened.

    Raises:
        UserError: a line was changed, lost or put in.
    """

    def __init__(self, file: Path):
        self._descriptor = open_regular(file, os.O_RDWR | os.O_CREAT)
        self.file = file
        self._hash = ""
        end = self.lines = 0
        with file.open("rb") as there:
            for line in there:
                if not line.endswith(b"\n"):
                    break
                if line != self._seal(line[:-SEAL_LENGTH]):
                    raise damaged(file.parent)
                end += len(line)
                self.lines += 1
        truncate(self._descriptor, end)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, _, row in self.places())

    def places(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Where each line begins, its length, and what it says."""
        begin = 0
        with self.file.open("rb") as there:
            for line in there:
                yield begin, len(line), json.loads(line)
                begin += len(line)

    def read(self, begin: int, length: int) -> dict[str, Any]:
        return json.loads(os.pread(self._descriptor, length, begin))

    def append(self, *rows: dict[str, Any]) -> None:
        """They are on disk when it returns."""
        lines = [self._seal(json.dumps(row)[:-1].encode()) for row in rows]
        write_all(self._descriptor, b"".join(lines))
        os.fsync(self._descriptor)

    def _seal(self, row: bytes) -> bytes:
        """The next line, of `row`, a JSON object without its closing brace."""
        self._hash = xxh3_64_hexdigest(self._hash.encode() + row)
        return row + (SEAL % self._hash).encode()

    def close(self) -> None:
        os.close(self._descriptor)


class Staging:
    """Results of a source's items, in its order.

    Attributes:
        done: items whose results are in.
        rejected: those of them that could not be read.
    """

    def __init__(self, folder: Path):
        self.journal = Journal(folder / "images.jsonl")
        self._images = os.open(folder / "images.bin", os.O_RDWR | os.O_CREAT, 0o666)
        self._waiting: list[dict[str, Any]] = []
        self.done, self.rejected, self._end = self.journal.lines, 0, 0
        for row in self.journal:
            self.rejected += row["reason"] is not None
            self._end = row["offset"] + row["bytes"]
        if os.fstat(self._images).st_size < self._end:
            raise damaged(folder)
        truncate(self._images, self._end)

    def add(self, item: Item, result: Result) -> None:
        row: dict[str, Any] = {
            "split": item.split,
            "label": item.label,
            "source": item.name,
            "offset": self._end,
            "bytes": 0,
            "reason": None,
        }
        if isinstance(result, Rejected):
            row["reason"] = result.reason
            self.rejected += 1
        else:
            write_all(self._images, result.data)
            row["bytes"] = len(result.data)
            row |= {name: getattr(result, name) for name in RESULT_COLUMNS}
        self._end += row["bytes"]
        self.done += 1
        self._waiting.append(row)
        if len(self._waiting) == COMMIT_EVERY:
            self.commit()

    def commit(self) -> None:
        """What was added is on disk when it returns."""
        if self._waiting:
            os.fsync(self._images)
            self.journal.append(*self._waiting)
            self._waiting = []

    def rows(self, placed: np.ndarray) -> Iterator[dict[str, Any]]:
        """The lines of the images that `place_images` gave these places."""
        return map(self.journal.read, placed["line"].tolist(), placed["length"].tolist())

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._images, size, offset)

    def close(self) -> None:
        self.journal.close()
        os.close(self._images)


RESULT_COLUMNS = (
    "kind",
    "sha256",
    "xxh3_64",
    "original_bytes",
    "original_width",
    "original_height",
)


def write_all(descriptor: int, data: bytes) -> None:
    """Unbuffered, so that a full disk is met here and not again when the file is closed."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def truncate(descriptor: int, end: int) -> None:
    """Cuts a file at `end`, and goes on there."""
    os.ftruncate(descriptor, end)
    os.lseek(descriptor, end, os.SEEK_SET)


def begin(folder: Path, about: dict[str, Any]) -> None:
    """Makes the staging `folder` for a run that is `about`, or finds that it is this run's.

    Raises:
        UserError: it is another run's.
    """
    begun = folder / "begun.json"
    about = json.loads(json.dumps(about))
    if not begun.exists():
        shutil.rmtree(folder, ignore_errors=True)  # nothing was done in it, or all is done
        folder.mkdir(parents=True)
        with write_whole(begun) as part:
            part.write_text(json.dumps(about, indent=1))
    try:
        there = read_json(begun)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(folder) from error
    if not isinstance(there, dict):
        raise damaged(folder)
    if changed := [key for key in about if there.get(key) != about[key]]:
        first = changed[0]
        was = "other images" if first == "source" else f"{first} {there.get(first)}"
        raise UserError(
            f"{folder} is an unfinished run's, with {was}: finish that with its own command, or "
            "remove the folder"
        )


def remove(folder: Path) -> None:
    """`begun.json` last but for the folder, so that a rest without it is known to be none."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "begun.json":
            entry.unlink()
    shutil.rmtree(folder)
