"""What a set says of itself: manifest.parquet, errors.parquet, summary.json, timing.json."""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.images import HONEST_PIXELS
from data_prep.sources import SPLITS, Source
from data_prep.staging import RESULT_COLUMNS, Staging

ROWS_AT_A_TIME = 1 << 11


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
    """A shard holds as many image files as fit in this, and at least one."""

    def identity(self) -> dict[str, Any]:
        """What tells two preparations apart: a field that came later is left out at its default, so
        that earlier sets are recognised."""
        own = asdict(self)
        if self.max_pixels == HONEST_PIXELS:
            del own["max_pixels"]
        return own


VERSIONS = ("tarflow_dist", "pillow", "mosaicml-streaming")
IMAGE = {
    "split": "string",
    "label": "int64",
    "source": "string",
    "bytes": "int64",
    "reason": "string",
    "kind": "string",
    "sha256": "string",
    "xxh3_64": "string",
    "original_bytes": "int64",
    "original_width": "int64",
    "original_height": "int64",
}
ERRORS = ("split", "source", "class", "label", "reason")
MANIFEST = (
    "split",
    "index",
    "source",
    "class",
    "class_name",
    "label",
    "shard",
    "offset",
    "bytes",
    *RESULT_COLUMNS,
)


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONS}


def summarise(source: Source, settings: Settings, placed: np.ndarray) -> dict[str, Any]:
    """`placed` as `place_images` gives it."""
    bad = placed["bad"]

    def per_class(which: np.ndarray) -> dict[str, list[int]]:
        counts = {}
        for number, name in enumerate(SPLITS):
            labels = placed["label"][which & (placed["split"] == number)]
            counts[name] = np.bincount(labels, minlength=len(source.classes)).tolist()
        return counts

    counts = per_class(~bad)
    return {
        "name": source.name,
        "layout": source.layout,
        "image_size": settings.size,
        "channels": source.channels,
        "classes": list(source.classes),
        "class_names": list(source.class_names) if source.class_names else None,
        "images": {name: sum(count) for name, count in counts.items()},
        "images_per_class": counts,
        "errors": int(bad.sum()),
        "errors_per_class": per_class(bad),
        "passed_over": dict(source.passed_over),
        "notes": list(source.notes),
        "settings": asdict(settings),
        "versions": versions(),
    }


def write_records(
    folder: Path,
    source: Source,
    images: Staging,
    placed: np.ndarray,
    shards: dict[str, list[np.ndarray]],
    entries: Mapping[str, Iterable[dict[str, Any]]],
    summary: dict[str, Any],
) -> None:
    """`shards` holds each split's shards, the positions in `placed` of the images in them;
    `entries` what the writer said of each."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    bad = placed[placed["bad"]]
    parts = np.split(bad, range(ROWS_AT_A_TIME, len(bad), ROWS_AT_A_TIME))
    errors = (_table(source, images, part) for part in parts)
    _write_table(folder / "errors.parquet", errors, ERRORS)
    manifest = _manifest(source, images, placed, shards, entries)
    _write_table(folder / "manifest.parquet", manifest, MANIFEST)


def _manifest(
    source: Source,
    images: Staging,
    placed: np.ndarray,
    shards: dict[str, list[np.ndarray]],
    entries: Mapping[str, Iterable[dict[str, Any]]],
) -> Iterator[Any]:
    """A table a shard."""
    import pyarrow as pa

    for split in shards:
        index = 0
        for chosen, entry in zip(shards[split], entries[split], strict=True):
            table = _table(source, images, placed[chosen])
            table = table.append_column("index", pa.array(np.arange(index, index + len(chosen))))
            table = table.append_column("offset", pa.array(entry["offsets"], pa.int64()))
            shard = pa.array([f"{split}/{entry['file']}"] * len(chosen))
            yield table.append_column("shard", shard)
            index += len(chosen)


def _table(source: Source, images: Staging, placed: np.ndarray) -> Any:
    """What the staging folder says of these images, with their classes, as an Arrow table."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in IMAGE.items()])
    table = pa.Table.from_pylist(list(images.rows(placed)), schema=schema)
    labels = table["label"].combine_chunks()
    nameless = [None] * len(source.classes)
    for column, names in {"class": source.classes, "class_name": source.class_names}.items():
        table = table.append_column(column, pa.array(names or nameless, pa.string()).take(labels))
    return table


def _write_table(file: Path, tables: Iterable[Any], columns: tuple[str, ...]) -> None:
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
