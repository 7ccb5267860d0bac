"""Reading .npz files of any origin. Nothing is unpickled."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_dist.errors import UserError
from tarflow_dist.files import read_npy_header, regular

IMAGES = "arr_0"
"""ADM's name for images in an .npz, uint8 (N, H, W, C)."""
LABELS = "arr_1"
"""And for their labels (N,)."""


@contextmanager
def open_npz(file: Path) -> Iterator[Any]:
    """The arrays of an .npz, none of them unpickled.

    Raises:
        UserError: it is missing, damaged, no .npz, or holds pickles.
    """
    try:
        regular(file)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    try:
        _check_sizes(file)
        with np.load(file, allow_pickle=False) as npz:
            if not isinstance(npz, np.lib.npyio.NpzFile):
                raise UserError(f"{file} is a single array and no .npz")
            yield npz
    except UserError:
        raise
    except Exception as error:  # whatever damage does to a parser
        if not zipfile.is_zipfile(file):
            reason = "is no .npz, or damaged"
        else:
            reason = "holds pickled objects" if "pickle" in str(error).lower() else "is damaged"
        raise UserError(
            f"{file} {reason}, and is not opened: give an .npz of statistics, such as `python -m "
            "tarflow_dist.reference` writes or ADM's VIRTUAL_*.npz"
        ) from error


def _check_sizes(file: Path) -> None:
    """Raises `ValueError` if an array is said to be larger than what there is of it: it would be
    made room for first."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                shape, _, dtype = read_npy_header(stream)
                if dtype.hasobject:
                    raise ValueError(f"{member.filename} is pickled")
                if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
                    raise ValueError(f"{member.filename} is not as long as it says")


def shape_of_images(file: Path) -> tuple[int, ...] | None:
    """(N, H, W, C) of the images that an .npz of ADM's holds, or None where it holds none."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{IMAGES}.npy") as stream:
            shape, fortran_order, dtype = read_npy_header(stream)
    except KeyError:
        return None
    if fortran_order or dtype != np.uint8 or len(shape) != 4:
        raise UserError(f"{file}: {IMAGES} is {dtype} {shape}, and images are uint8 (N, H, W, C)")
    if shape[0] < 2:
        raise UserError(f"{file} holds {shape[0]} images, and a comparison needs two or more")
    return shape


def image_batches(
    file: Path, batch_size: int, *, rank: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Rank's share of the images that an .npz of ADM's holds: their places (B,) and the images
    uint8 (B, H, W, C). Holds one batch in memory at a time."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{IMAGES}.npy") as stream:
        shape, _, dtype = read_npy_header(stream)
        size = int(np.prod(shape[1:]))
        for number, start in enumerate(range(0, shape[0], batch_size)):
            count = min(batch_size, shape[0] - start)
            data = stream.read(count * size)
            if number % world_size == rank:
                images = np.frombuffer(data, dtype).reshape(count, *shape[1:])
                yield np.arange(start, start + count), images
