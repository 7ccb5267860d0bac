"""What a set says of itself: manifest.parquet, errors.parquet, summary.json, timing.json."""

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Recipe
from data_prep.images import HONEST_PIXELS
from data_prep.sources import Source

ROWS_AT_A_TIME = 1 << 11
VERSION = 2
"""Of sets: since 2, shards hold as many images each, whatever their bytes."""


@dataclass(frozen=True)
class Settings:
    """What the stored bytes depend on, besides the source."""

    size: int | None
    """Side of the square images; None where `encode` is keep."""
    crop: str = "adm"
    encode: str = "png"
    seed: int = 0
    max_errors: float = 0.01
    """Share of the images that may be unreadable; ten may be in any case, but never all."""
    max_pixels: int = HONEST_PIXELS
    """Of an image file; larger ones are set aside."""
    shard_bytes: int = 1 << 26
    """About what the image files in a shard have together, unless they are more than 2048."""

    def identity(self) -> dict[str, Any]:
        """What tells two preparations apart: a field that came later is left out at its default, so
        that earlier sets are recognised."""
        own = asdict(self)
        if self.max_pixels == HONEST_PIXELS:
            del own["max_pixels"]
        return own

    def recipe(self, channels: int) -> Recipe:
        return Recipe(self.size, channels, self.crop, self.encode, self.max_pixels)


RESULT_COLUMNS = (
    "kind",
    "sha256",
    "xxh3_64",
    "original_bytes",
    "original_width",
    "original_height",
)
RESULT = {
    "reason": "string",
    "bytes": "int64",
    **dict.fromkeys(RESULT_COLUMNS[:3], "string"),
    **dict.fromkeys(RESULT_COLUMNS[3:], "int64"),
}
"""What became of an image. Those that could not be read have a reason, and nothing else."""
ERRORS = ("split", "source", "class", "label", "reason")
MANIFEST = (
    "split",
    "index",
    "position",
    "source",
    "class",
    "class_name",
    "label",
    "shard",
    "offset",
    "bytes",
    *RESULT_COLUMNS,
)
"""`index` counts the images that are there; `position`, which the shards have, those planned."""


def versions() -> dict[str, str]:
    names = ("tarflow_dist", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def summarise(
    source: Source, settings: Settings, stored: dict[str, np.ndarray], bad: dict[str, np.ndarray]
) -> dict[str, Any]:
    """`stored` and `bad` are each split's images of each class: (num_classes,) int64."""
    return {
        "version": VERSION,
        "name": source.name,
        "layout": source.layout,
        "image_size": settings.size,
        "channels": source.channels,
        "classes": list(source.classes),
        "class_names": list(source.class_names) if source.class_names else None,
        "images": {split: int(counts.sum()) for split, counts in stored.items()},
        "images_per_class": {split: counts.tolist() for split, counts in stored.items()},
        "errors": sum(int(counts.sum()) for counts in bad.values()),
        "errors_per_class": {split: counts.tolist() for split, counts in bad.items()},
        "passed_over": dict(sorted(source.passed_over.items())),
        "notes": [*source.notes, *([IN_BLOCKS] if source.in_blocks else ())],
        "settings": asdict(settings),
        "versions": versions(),
    }


IN_BLOCKS = (
    "shuffled in blocks, as the files must be read: images that lie together there stay within a "
    "shard or two"
)


def image_table(source: Source, split: str, first: int, planned: Any, rows: Any) -> Any:
    """What is known of a shard's images, those that could not be read among them, as an Arrow
    table.

    Args:
        first: position of its first image.
        planned: the plan's rows of them.
        rows: RESULT, and offsets in the shards' files.
    """
    import pyarrow as pa

    labels = planned["label"].combine_chunks().cast("int64")
    nameless = [None] * len(source.classes)
    known = {
        "split": pa.array([split] * len(labels)),
        "position": pa.array(np.arange(first, first + len(labels))),
        "source": planned["name"],
        "label": labels,
        "class": pa.array(source.classes, pa.string()).take(labels),
        "class_name": pa.array(source.class_names or nameless, pa.string()).take(labels),
    }
    return pa.table({**known, **{name: rows[name] for name in rows.column_names}})


def write_table(file: Path, tables: Iterable[Any], columns: tuple[str, ...]) -> None:
    """Writes them in row groups of ROWS_AT_A_TIME or a shard more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, waiting = None, []
    for table in tables:
        waiting.append(table.select(columns))
        if writer is None:  # with checksums, so that a flipped bit in a label is noticed
            writer = pq.ParquetWriter(file, waiting[0].schema, write_page_checksum=True)
        if sum(map(len, waiting)) >= ROWS_AT_A_TIME:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
            waiting = []
    assert writer is not None
    with writer:
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
