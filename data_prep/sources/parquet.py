"""Parquet files as Hugging Face's hub has them."""

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_prep.sources.base import SPLITS, Place
from data_prep.sources.objects import open_file
from data_prep.sources.tables import Part, Tables, image_in, table_columns
from tarflow_dist.errors import UserError

# how the hub's names begin; test files have no labels
PREFIXES = {"train": ("train",), "val": ("validation", "valid", "val")}


class Parquet(Tables):
    """A folder with train-*.parquet and validation-*.parquet, itself or in data/; for what is in
    them, see Tables.

    Raises:
        UserError: `path` is no such folder, or a file is damaged.
    """

    layout = "parquet"
    in_blocks = True

    def __init__(self, path: Path):
        self._files = _find(path)
        if missing := [split for split in SPLITS if not self._files[split]]:
            begin = PREFIXES[missing[0]][0]
            raise UserError(f"{path} has no files {begin}-*.parquet, here or in data/")
        super().__init__(path)

    @staticmethod
    def recognises(path: Path) -> bool:
        return any(_find(path).values())

    def parts(self) -> Iterator[Part]:
        """The files' row groups."""
        from pyarrow.parquet import ParquetFile

        for split, files in self._files.items():
            for file in files:
                with open_file(file) as stream, ParquetFile(stream, pre_buffer=False) as parquet:
                    for group in range(parquet.num_row_groups):
                        read = partial(parquet.read_row_group, group)
                        yield Part(split, file, group, parquet.schema_arrow, read)


def _find(path: Path) -> dict[str, list[Path]]:
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return {
        split: [file for file in files if re.split(r"[-.]", file.name)[0] in PREFIXES[split]]
        for split in SPLITS
    }


def read_row(file: Path, place: Place) -> bytes | None:
    return image_in(_row_group(file, place.block), place.offset)


@lru_cache(maxsize=1)
def _row_group(file: Path, number: int) -> Any:
    """The images in it."""
    from pyarrow.parquet import ParquetFile

    try:
        with open_file(file) as stream, ParquetFile(stream, pre_buffer=False) as parquet:
            column = table_columns(parquet.schema_arrow).image
            return parquet.read_row_group(number, [column])[column]
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):  # the system's, and not pyarrow's
            raise
        said = str(error).splitlines()[0]
        raise UserError(f"{file} is damaged ({said}): fetch it again") from error
