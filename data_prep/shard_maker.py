"""A shard made whole from the source: the unit of work, for any process on any node.

It is encoded once for all formats. A shard is done when OUT/.partial/done has its two files: what
became of each image, and a sealed description of that and of the shards' files, written last.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from data_prep.encode import store_image
from data_prep.formats import IMAGE_HASHES, Shard, digest, make_format
from data_prep.plan import Plan
from data_prep.settings import Settings
from data_prep.sources import read_images
from tarflow_dist.files import (
    from_saved,
    give_up_pages,
    read_regular,
    read_sealed,
    write_sealed,
    write_whole,
)

VERSION = 1
DONE, PARTS = "done", "parts"
STORED = {
    "kind": "string",
    "sha256": "string",
    "xxh3_64": "string",
    "original_bytes": "int64",
    "original_width": "int64",
    "original_height": "int64",
}
"""What is known of an image that is stored: see images.Stored."""
IMAGE = {
    "split": "string",
    "position": "int64",
    "source": "string",
    "class": "string",
    "label": "int64",
    "reason": "string",
    "bytes": "int64",
    **STORED,
}
"""What is known of any image. Those that could not be read have a reason, and nothing from there
on."""


@dataclass(frozen=True)
class Record:
    """What is known of a shard that is done."""

    bad: int
    """Of its images, those that could not be read."""
    parquet: bytes
    """A file of `table`."""
    shards: Mapping[str, Shard]
    """By format; empty if no image could be read."""

    @cached_property
    def table(self) -> Any:
        """A pyarrow table of IMAGE and where the images begin in the shards, a row an image of the
        plan."""
        import pyarrow.parquet as pq

        return pq.read_table(BytesIO(self.parquet), use_threads=False)


@dataclass(frozen=True)
class ShardMaker:
    """Makes any of the shards that are planned in OUT/.partial, or finds them there.

    Attributes:
        folder: OUT/.partial.
        path: the source's.
    """

    folder: Path
    path: Path
    settings: Settings
    formats: Sequence[str]

    def __call__(self, number: int) -> tuple[int, bool]:
        """How many of the shard's images could not be read, and whether it was there.

        Raises:
            UserError: the system refuses files or memory.
            OSError: it can't be written.
        """
        if record := read_record(self.folder, number):
            return record.bad, True
        plan = Plan(self.folder)
        planned, rows = plan.shards[number], self._rows(plan, number)
        stored = [row for row in rows if "reason" not in row]
        shards = {}
        for form in self.formats if stored else ():
            writer = make_format(
                form, plan.name, self.settings.encode, self.settings.size, plan.channels
            )
            file = writer.file(planned.split, planned.number)
            data, offsets = writer.pack(stored)
            self._put(self.folder / form / file, data)
            shards[form] = Shard(file, len(stored), len(data), writer.hashes(data))
            for row, offset in zip(stored, offsets, strict=True):
                row[f"{form}_offset"] = offset
        table = self._table(rows)
        done = self.folder / DONE / f"{number:06d}"
        self._put(done.with_suffix(".parquet"), table)
        bad = len(rows) - len(stored)
        about = {
            "number": number,
            "bad": bad,
            "table": xxh3_128_hexdigest(table),
            "shards": {form: asdict(shard) for form, shard in shards.items()},
        }
        write_sealed(done.with_suffix(".json"), about, version=VERSION)
        return bad, False

    def _rows(self, plan: Plan, number: int) -> list[dict[str, Any]]:
        """What becomes of each image, in the order of the plan: a row of IMAGE, and its bytes as
        `data` if it is stored."""
        planned, items = plan.shards[number], plan.items(number)
        # they are read as they lie, so that a block is read once
        order = sorted(range(len(items)), key=lambda i: items[i].place[1:])
        reads = read_images(self.path, [items[i].place for i in order])
        rows = {}
        for i, read in zip(order, reads, strict=True):
            rows[i] = {
                "split": planned.split,
                "position": planned.first + i,
                "source": items[i].name,
                "class": plan.classes[items[i].label],
                "label": items[i].label,
            }
            result = store_image(read, self.settings, plan.channels)
            if isinstance(result, str):
                rows[i]["reason"] = result
            else:
                rows[i] |= {"bytes": len(result.data), **result._asdict()}
                rows[i] |= {kind: digest(kind, result.data) for kind in IMAGE_HASHES}
        return [rows[i] for i in range(len(items))]

    def _table(self, rows: list[dict[str, Any]]) -> bytes:
        """A Parquet file, as Record has it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = IMAGE | dict.fromkeys((f"{form}_offset" for form in self.formats), "int64")
        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in kinds.items()])
        file = BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), file)
        return file.getvalue()

    def _put(self, file: Path, data: bytes) -> None:
        # a name that no process of another node has; what a kill leaves of it is in no set
        part = self.folder / PARTS / f"{socket.gethostname()}-{os.getpid()}"
        for folder in (part.parent, file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with write_whole(file, part) as part:
            part.write_bytes(data)
        give_up_pages(file)


def read_record(folder: Path, number: int) -> Record | None:
    """What is known of a shard; None if it is not there, or not whole."""
    done = folder / DONE / f"{number:06d}"
    try:
        about = read_sealed(done.with_suffix(".json"), version=VERSION)
        parquet = read_regular(done.with_suffix(".parquet"))
        shards = {form: from_saved(Shard, shard) for form, shard in about["shards"].items()}
        whole = (about["number"], about["table"]) == (number, xxh3_128_hexdigest(parquet)) and all(
            _size(folder, form, shard.file) == shard.bytes for form, shard in shards.items()
        )
        return Record(about["bad"], parquet, shards) if whole else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _size(folder: Path, form: str, file: str) -> int:
    """Of a shard, whose set may be published already."""
    place = folder / form / file
    return (place if place.exists() else folder.parent / form / file).stat().st_size
