"""The downsampled ImageNet of Chrabaszcz, Loshchilov and Hutter, 64x64 or 32x32, as .npz."""

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from math import isqrt
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

import numpy as np

from data_prep.sources.base import Group, Item, Place, Source
from data_prep.sources.names import MAX_CLASSES, SPLITS
from data_prep.sources.storage import damage_named, open_file, patiently, read_part, zip_part
from tarflow_dist.errors import UserError
from tarflow_dist.files import read_npy_header

NAME = re.compile(r"(train|val)_data(?:_batch_(\d+))?\.npz")
PIXELS = "data.npy"
NOTE = (
    "labels are the source's own less one, in the order of its map_clsloc.txt: not that of sorted "
    "wnids"
)


class Npz(Source):
    """A folder with train_data_batch_1.npz … and val_data.npz, in itself or in folders in it:
    `data`, uint8 (n, 3 S S), a channel after the other, and `labels`, from 1 on. Pixels are read a
    row at a time, in compressed files from the front on, and nothing is unpickled.

    Raises:
        UserError: `path` is no such folder, or a file is damaged.
    """

    def __init__(self, path: Path):
        files = _find(path)
        if missing := _missing(files):
            raise UserError(f"{path} has no {missing}, here or in its folders: fetch it again")
        groups = [_scan(split, file) for split, file in files]
        count = 1 + max(int(np.max(group.label)) for group in groups)
        classes = [str(number) for number in range(1, count + 1)]
        super().__init__("npz", path, classes, groups, notes=[NOTE])

    @staticmethod
    def recognises(path: Path) -> bool:
        return bool(_find(path))

    def items(self) -> Iterator[Item]:
        """Holds all pixels against the files' checksums first."""
        for group in self.groups:
            patiently(partial(_check_sums, group.where), group.where)
        return super().items()


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


def _scan(split: str, file: Path) -> Group:
    with (
        damage_named(f"{file} can't be read"),
        open_file(file) as raw,
        np.load(raw, allow_pickle=False) as arrays,
    ):
        labels = arrays["labels"].reshape(-1)
        is_whole = labels.dtype.kind in "iu" and len(labels) > 0
        if not is_whole or not 1 <= labels.min() <= labels.max() <= MAX_CLASSES:
            raise ValueError("its labels are not whole numbers from 1 on")
        member = arrays.zip.getinfo(PIXELS)
        with arrays.zip.open(member) as stream:
            size, start = _row_size(stream, len(labels)), stream.tell()
        if member.file_size < start + size * len(labels):
            raise ValueError("it ends too early")
        if not member.compress_type:
            start += zip_part(raw, member)[0]
    rows = np.arange(len(labels))
    return Group(
        split,
        labels.astype(np.int64) - 1,
        f"{split}/{file.stem}/",
        file,
        [f"{row:06d}" for row in rows],
        np.stack([start + size * rows, np.full_like(rows, size)], axis=1),
        reader="npz compressed" if member.compress_type else "npz",
        in_block=bool(member.compress_type),
    )


def _check_sums(file: Path) -> None:
    said = damage_named(f"{file} can't be read")
    with said, open_file(file) as raw, ZipFile(raw) as archive:
        if name := archive.testzip():
            raise BadZipFile(f"the checksum of {name} is another")


def _row_size(stream: IO[bytes], count: int) -> int:
    """The bytes of an image; `stream` is left where the first begins.

    Raises:
        ValueError: this is no array of `count` square images.
    """
    shape, is_fortran, dtype = read_npy_header(stream)
    side = isqrt(shape[-1] // 3) if shape else 0
    if dtype != np.uint8 or is_fortran or shape != (count, 3 * side * side) or not side:
        raise ValueError(f"its data are {dtype} {shape}, and not uint8 ({count}, 3 S S)")
    return shape[1]


def read_pixels(file: Path, place: Place, compressed: str = "") -> np.ndarray:
    """(S, S, 3)."""
    if compressed:
        stream = _open_pixels(file)
        stream.seek(place.offset)  # backwards it begins anew
        row = stream.read(place.size)
    else:
        row = read_part(file, place.offset, place.size)
    side = isqrt(place.size // 3)
    return np.frombuffer(row, np.uint8).reshape(3, side, side).transpose(1, 2, 0)


@lru_cache(maxsize=1)
def _open_pixels(file: Path) -> IO[bytes]:
    return ZipFile(open_file(file)).open(PIXELS)
