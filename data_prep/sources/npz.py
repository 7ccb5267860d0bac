"""The downsampled ImageNet of Chrabaszcz, Loshchilov and Hutter, 64x64 or 32x32, as .npz."""

import re
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from math import isqrt
from pathlib import Path
from types import MappingProxyType
from typing import IO
from zipfile import BadZipFile, ZipFile

import numpy as np

from data_prep.sources.base import (
    MAX_CLASSES,
    SPLITS,
    Item,
    Place,
    set_name,
    zip_part,
)
from data_prep.sources.objects import open_file, read_part
from tarflow_dist.errors import UserError
from tarflow_dist.files import read_npy_header

NAME = re.compile(r"(train|val)_data(?:_batch_(\d+))?\.npz")
CHUNK = 1 << 20
NOTE = (
    "labels are the source's own less one, in the order of its map_clsloc.txt: not that of sorted "
    "wnids"
)


class Npz:
    """A folder with train_data_batch_1.npz … and val_data.npz, in itself or in folders in it:
    `data`, uint8 (n, 3 S S), a channel after the other, and `labels`, from 1 on. Pixels are read a
    row at a time, in compressed files from the front on, and nothing is unpickled.

    Raises:
        UserError: `path` is no such folder, or a file is damaged.
    """

    layout = "npz"
    channels = 3
    passed_over: Mapping[str, int] = MappingProxyType({})
    notes = (NOTE,)
    class_names = None

    def __init__(self, path: Path):
        self.path = path
        self._files = _find(path)
        if missing := _missing(self._files):
            raise UserError(f"{path} has no {missing}, here or in its folders: fetch it again")
        self._labels = [_read_labels(file) for _, file in self._files]
        count = max(int(labels.max()) for labels in self._labels)
        self.classes = [str(number) for number in range(1, count + 1)]
        self.name = set_name(path, self.classes)
        self.in_blocks = any(_first_byte(file, n) is None for file, n in self._counts())

    @staticmethod
    def recognises(path: Path) -> bool:
        return bool(_find(path))

    def __len__(self) -> int:
        return sum(map(len, self._labels))

    def _counts(self) -> Iterator[tuple[Path, int]]:
        """Each file, and its images."""
        for (_, file), labels in zip(self._files, self._labels, strict=True):
            yield file, len(labels)

    def items(self) -> Iterator[Item]:
        """Holds all pixels against the files' checksums first."""
        for (split, file), labels in zip(self._files, self._labels, strict=True):
            size = _check(file, len(labels))
            start = _first_byte(file, len(labels))
            reader = "npz" if start is not None else "npz compressed"
            within = str(file.relative_to(self.path))
            for row, label in enumerate(labels.tolist()):
                place = Place(reader, within, 0, (start or 0) + row * size, size)
                yield Item(split, label - 1, f"{split}/{file.stem}/{row:06d}", place)

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for (split, file), labels in zip(self._files, self._labels, strict=True):
            digest.update(f"{split} {file.absolute()} {file.stat().st_size}".encode())
            digest.update(labels.tobytes())
        return digest.hexdigest()


def _find(path: Path) -> list[tuple[str, Path]]:
    """Split and file, by their numbers."""
    found = []
    for file in (*path.glob("*.npz"), *path.glob("*/*.npz")):
        if match := NAME.fullmatch(file.name):
            found.append((SPLITS.index(match[1]), int(match[2] or 0), file))
    return [(SPLITS[split], file) for split, _, file in sorted(found)]


def _missing(files: list[tuple[str, Path]]) -> str:
    """The first file that should be there."""
    names = [file.name for _, file in files]
    batches = [name for name in names if name.startswith("train_data_batch_")]
    whole = [f"train_data_batch_{n}.npz" for n in range(1, len(batches) + 1)]
    expected = [*(whole or ["train_data_batch_1.npz"]), "val_data.npz"]
    return next((name for name in expected if names.count(name) != 1), "")


def _read_labels(file: Path) -> np.ndarray:
    """(n,) int64."""
    try:
        with open_file(file) as stream, np.load(stream, allow_pickle=False) as arrays:
            labels = arrays["labels"].reshape(-1)
        is_whole = labels.dtype.kind in "iu" and len(labels) > 0
        if not is_whole or not 1 <= labels.min() <= labels.max() <= MAX_CLASSES:
            raise ValueError("its labels are not whole numbers from 1 on")
        return labels.astype(np.int64)
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError, BadZipFile) as error:
        raise _damaged(file, error) from error


def _check(file: Path, count: int) -> int:
    """Reads all pixels of a file of `count` images, and returns the bytes of one."""
    try:
        with open_file(file) as raw, ZipFile(raw) as archive, archive.open("data.npy") as stream:
            size, length = _row_size(stream, count), 0
            while chunk := stream.read(CHUNK):
                length += len(chunk)
            if length < size * count:
                raise ValueError("it ends too early")
            return size
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError, BadZipFile, zlib.error) as error:
        raise _damaged(file, error) from error


def _first_byte(file: Path, count: int) -> int | None:
    """Where the pixels begin in a file of `count` images; None if they are compressed."""
    try:
        with open_file(file) as raw, ZipFile(raw) as archive:
            member = archive.getinfo("data.npy")
            with archive.open(member) as stream:
                _row_size(stream, count)
                header = stream.tell()
            return zip_part(raw, member)[0] + header if not member.compress_type else None
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError, BadZipFile) as error:
        raise _damaged(file, error) from error


def read_pixels(file: Path, place: Place, compressed: str = "") -> np.ndarray:
    """(S, S, 3)."""
    row = _inflated(file, place) if compressed else read_part(file, place.offset, place.size)
    side = isqrt(place.size // 3)
    return np.frombuffer(row, np.uint8).reshape(3, side, side).transpose(1, 2, 0)


def _inflated(file: Path, place: Place) -> bytes:
    stream, first = _open_member(file)
    stream.seek(first + place.offset)  # backwards it begins anew
    return stream.read(place.size)


@lru_cache(maxsize=1)
def _open_member(file: Path) -> tuple[IO[bytes], int]:
    """The file's pixels, and where they begin."""
    stream = ZipFile(open_file(file)).open("data.npy")  # noqa: SIM115  (it stays open)
    _row_size(stream, None)
    return stream, stream.tell()


def _row_size(stream: IO[bytes], count: int | None) -> int:
    """The bytes of an image; `stream` is left where the first begins.

    Raises:
        ValueError: this is no array of `count` square images.
    """
    shape, is_fortran, dtype = read_npy_header(stream)
    side = isqrt(shape[-1] // 3) if shape else 0
    expected = (shape[0] if count is None and shape else count, 3 * side * side)
    if dtype != np.uint8 or is_fortran or shape != expected or not side:
        raise ValueError(f"its data are {dtype} {shape}, and not uint8 ({count}, 3 S S)")
    return shape[1]


def _damaged(file: Path, error: Exception) -> UserError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{file} can't be read ({said}): fetch it again")
