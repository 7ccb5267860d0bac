"""Which images make which shard, settled before any of them is stored.

OUT/.partial/plan.parquet has the images in the order in which they will be stored, a row group a
shard; begun.json says what the preparation is. Both depend on source and settings alone, and are
all that a process needs to make any of the shards.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import store_image
from data_prep.images import Stored
from data_prep.settings import Settings
from data_prep.sources import Source, read_image
from data_prep.sources.base import Item, Place
from data_prep.sources.names import SPLITS, shuffle_key
from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, read_sealed, write_sealed, write_whole

VERSION = 1
PLAN, BEGUN = "plan.parquet", "begun.json"
SAMPLED = 16  # images that tell how many fill a shard
MAX_IMAGES = 2048  # of a shard, however small: a worker is at one for seconds, and not for hours
SHARES = 16
"""Shards that a split has if they can be an eighth full: as many workers have their share."""
ROWS = 1 << 16  # of the plan, turned into columns at a time
COLUMNS = {
    "split": "int8",
    "label": "int32",
    "name": "string",
    "reader": "string",
    "file": "binary",  # names need not be UTF-8
    "block": "int64",
    "offset": "int64",
    "size": "int64",
}


def begin(folder: Path, source: Source, settings: Settings, about: dict[str, Any]) -> None:
    """Plans in `folder` the preparation that is `about`, or finds that it was begun there.

    Raises:
        UserError: another one was.
    """
    if not (folder / BEGUN).exists():
        shutil.rmtree(folder, ignore_errors=True)  # nothing was done in it, or all is done
        folder.mkdir(parents=True)
        shards = _write_plan(folder / PLAN, source, settings)
        begun = {
            "about": about,
            "name": source.name,
            "channels": source.channels,
            "classes": list(source.classes),
            "shards": shards,
            "plan": describe(folder / PLAN),
        }
        write_sealed(folder / BEGUN, begun, version=VERSION)
    Plan(folder).check(about)


@dataclass(frozen=True)
class Planned:
    """A shard to be made."""

    split: str
    number: int
    """In its split."""
    first: int
    """Position of its first image in the split."""
    images: int


class Plan:
    """What `begin` has written in `folder`.

    Attributes:
        name, channels, classes: the source's.
        shards: of train, then of val.

    Raises:
        UserError: it is damaged.
        FileNotFoundError: nothing was begun, or all is done.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            begun = read_sealed(folder / BEGUN, version=VERSION)
            self._about: dict[str, Any] = begun["about"]
            self.name, self.channels, self.classes = (
                begun[key] for key in ("name", "channels", "classes")
            )
            if describe(folder / PLAN) != begun["plan"]:
                raise ValueError(f"{PLAN} is not as written")
            self.shards = list(self._planned(begun["shards"]))
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{folder} is damaged: remove it to start over ({' '.join(str(error).split())})"
            ) from error

    def _planned(self, counts: Mapping[str, int]) -> Iterator[Planned]:
        groups = self._file.metadata
        sizes = (groups.row_group(i).num_rows for i in range(groups.num_row_groups))
        for split, count in counts.items():
            first = 0
            for number, size in enumerate(islice(sizes, count)):
                yield Planned(split, number, first, size)
                first += size

    @cached_property
    def _file(self) -> Any:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(self._folder / PLAN)

    def check(self, about: Mapping[str, Any]) -> None:
        """Raises `UserError` if something in `about` is not what was begun."""
        if changed := [key for key in about if self._about.get(key) != about[key]]:
            first = changed[0]
            was = "other images" if first == "source" else f"{first} {self._about.get(first)}"
            raise UserError(
                f"{self._folder} is an unfinished run's, with {was}: finish that with its own "
                "command, or remove the folder"
            )

    def items(self, number: int) -> list[Item]:
        """The images of a shard, in the order in which they are stored."""
        table = self._file.read_row_group(number, use_threads=False)
        return [_item(row) for row in table.to_pylist()]


def _item(row: dict[str, Any]) -> Item:
    place = Place(row["reader"], os.fsdecode(row["file"]), row["block"], row["offset"], row["size"])
    return Item(SPLITS[row["split"]], row["label"], row["name"], place)


def _write_plan(file: Path, source: Source, settings: Settings) -> dict[str, int]:
    """Returns how many shards each split has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, keys = _list(source, settings.seed)
    splits = table["split"].to_numpy()
    blocks = _block_keys(table, settings.seed) if source.in_blocks else keys
    offsets = table["offset"].to_numpy()
    order = np.lexsort((offsets, blocks[:, 1], blocks[:, 0], splits))
    full = settings.shard_bytes / _mean_bytes(table, keys, source, settings)
    sizes = {split: _cut(int((splits == i).sum()), full) for i, split in enumerate(SPLITS)}
    lengths = [size for of_split in sizes.values() for size in of_split]
    shards = np.empty(len(table), np.int64)
    shards[order] = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((keys[:, 1], keys[:, 0], shards))
    table = table.take(pa.array(order))
    with (
        write_whole(file) as part,
        pq.ParquetWriter(part, table.schema, write_page_checksum=True) as writer,
    ):
        for end, length in zip(np.cumsum(lengths).tolist(), lengths, strict=True):
            writer.write_table(table.slice(end - length, length))
    return {split: len(of_split) for split, of_split in sizes.items()}


def _list(source: Source, seed: int) -> tuple[Any, np.ndarray]:
    """All images as an Arrow table with COLUMNS, and (n, 2) uint64, keys that shuffle them."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    items, batches, keys = source.items(), [], bytearray()
    while some := list(islice(items, ROWS)):
        rows = [
            {
                "split": SPLITS.index(item.split),
                "label": item.label,
                "name": item.name,
                **item.place._asdict(),
                "file": os.fsencode(item.place.file),
            }
            for item in some
        ]
        batches.append(pa.RecordBatch.from_pylist(rows, schema))
        keys += b"".join(shuffle_key(seed, "order", item.name) for item in some)
    return pa.Table.from_batches(batches, schema), np.frombuffer(keys, ">u8").reshape(-1, 2)


def _block_keys(table: Any, seed: int) -> np.ndarray:
    """(n, 2) uint64, the same for all images of a block."""
    files, blocks = table["file"].to_pylist(), table["block"].to_pylist()
    names = [f"{file!r} {block}" for file, block in zip(files, blocks, strict=True)]
    known = {name: shuffle_key(seed, "order", name) for name in set(names)}
    return np.frombuffer(b"".join(known[name] for name in names), ">u8").reshape(-1, 2)


def _mean_bytes(table: Any, keys: np.ndarray, source: Source, settings: Settings) -> float:
    """What an image takes as it will be stored, as a few of them tell."""
    chosen = table.take(np.argsort(keys[:, 0], kind="stable")[:SAMPLED])
    results = [
        store_image(partial(read_image, source.path, _item(row).place), settings, source.channels)
        for row in chosen.to_pylist()
    ]
    sizes = [len(result.data) for result in results if isinstance(result, Stored)]
    return sum(sizes) / len(sizes) if sizes else 1.0


def _cut(images: int, full: float) -> list[int]:
    """The images of each shard of a split, alike but for one; `full` of them fill a shard."""
    most = min(max(full / 8, min(full, images / SHARES)), MAX_IMAGES)
    count = -(-images // max(1, int(most)))
    return [images // count + (i < images % count) for i in range(count)]
