"""What a set says of itself: manifest.parquet, errors.parquet, summary.json."""

import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.sources import SPLITS, Source


@dataclass(frozen=True)
class Settings:
    """What the stored bytes depend on, besides the source."""

    size: int
    crop: str = "adm"
    encoding: str = "png"
    seed: int = 0
    max_errors: float = 0.01
    """Share of the images that may be unreadable; ten may be in any case, but never all."""
    shard_bytes: int = 1 << 26
    """A shard holds as many image files as fit in this, and at least one."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image that was encoded into the scratch file."""

    split: str
    label: int
    name: str
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """An image that could not be read."""

    split: str
    label: int
    name: str
    reason: str


def summarise(
    source: Source, settings: Settings, prepared: list[Prepared], rejected: list[Rejected]
) -> dict[str, Any]:
    count = Counter((image.split, image.label) for image in prepared)
    per_class = {
        split: [count[split, label] for label in range(len(source.classes))] for split in SPLITS
    }
    return {
        "name": source.name,
        "image_size": settings.size,
        "channels": source.channels,
        "classes": list(source.classes),
        "images": {split: sum(counts) for split, counts in per_class.items()},
        "images_per_class": per_class,
        "errors": len(rejected),
        "settings": asdict(settings),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("tarflow_dist", "pillow", "mosaicml-streaming")},
    }


def write_records(
    folder: Path,
    source: Source,
    splits: dict[str, list[list[Prepared]]],
    files: dict[str, list[str]],
    rejected: list[Rejected],
    summary: dict[str, Any],
) -> None:
    """`splits` and `files` hold each split's shards, the images in them and their file names."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    manifest = [
        {
            "split": split,
            "index": index,
            "source": image.name,
            "class": source.classes[image.label],
            "label": image.label,
            "shard": f"{split}/{file}",
            "bytes": image.size,
            "sha256": image.sha256,
        }
        for split, shards in splits.items()
        for index, (file, image) in enumerate(
            (file, image)
            for file, shard in zip(files[split], shards, strict=True)
            for image in shard
        )
    ]
    _write_table(folder / "manifest.parquet", manifest, MANIFEST)
    errors = [
        {
            "split": image.split,
            "source": image.name,
            "class": source.classes[image.label],
            "reason": image.reason,
        }
        for image in rejected
    ]
    _write_table(folder / "errors.parquet", errors, ERRORS)


MANIFEST = {
    "split": "string",
    "index": "int64",
    "source": "string",
    "class": "string",
    "label": "int64",
    "shard": "string",
    "bytes": "int64",
    "sha256": "string",
}
ERRORS = {"split": "string", "source": "string", "class": "string", "reason": "string"}


def _write_table(file: Path, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
