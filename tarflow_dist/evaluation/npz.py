"""Reading .npz files of any origin. Nothing is unpickled."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_dist.errors import UserError
from tarflow_dist.files import read_npy_header, regular


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
