"""What is written once, when all shards are there: indexes, manifest, errors, summary."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.formats import Shard, make_format
from data_prep.plan import Plan, Planned
from data_prep.settings import Settings, versions
from data_prep.shard_maker import STORED, Record, read_record
from data_prep.sources import Source
from data_prep.sources.names import SPLITS
from tarflow_dist.errors import UserError

ROWS_AT_A_TIME = 1 << 11
VERSION = 2
"""Of sets: since 2, shards hold as many images each, whatever their bytes."""
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
    *STORED,
)
"""`index` counts the images that are there; `position`, which the shards have, those planned."""
IN_BLOCKS = (
    "shuffled in blocks, as the files must be read: images that lie together there stay within a "
    "shard or two"
)


def describe_sets(source: Source, settings: Settings, folder: Path, formats: Sequence[str]) -> None:
    """Completes the sets in `folder`/FORMAT, whose shards are there.

    Raises:
        UserError: no image of a split could be read.
    """
    import pyarrow.compute as pc

    plan = Plan(folder)
    stored, bad = ({s: np.zeros(len(source.classes), np.int64) for s in SPLITS} for _ in range(2))
    shards: dict[str, dict[str, list[Shard]]]
    shards = {form: {split: [] for split in SPLITS} for form in formats}
    for planned, record in _records(plan, folder):
        for form in record.shards.keys() & shards.keys():
            shards[form][planned.split].append(record.shards[form])
        is_bad = pc.is_valid(record.table["reason"])
        for counts, chosen in ((stored, pc.invert(is_bad)), (bad, is_bad)):
            labels = record.table["label"].filter(chosen).to_numpy()
            counts[planned.split] += np.bincount(labels, minlength=len(source.classes))
    for split in SPLITS:
        if not stored[split].any():
            raise UserError(f"no image of {split} could be read")
    summary = _summarise(source, settings, stored, bad)
    for form in formats:
        writer = make_format(form, plan.name, settings.encode, settings.size, plan.channels)
        writer.write_index(folder / form, shards[form])
        manifest = _manifest(source, plan, folder, form)
        _write_table(folder / form / "manifest.parquet", manifest, MANIFEST)
        tables = (record.table for _, record in _records(plan, folder))
        errors = (table.filter(pc.is_valid(table["reason"])) for table in tables)
        _write_table(folder / form / "errors.parquet", errors, ERRORS)
        (folder / form / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def first_error(folder: Path) -> tuple[str, str]:
    """An image that could not be read, of the shards that are done, and why."""
    for number, _ in enumerate(Plan(folder).shards):
        record = read_record(folder, number)
        if record and record.bad:
            bad = next(row for row in record.table.to_pylist() if row["reason"])
            return bad["source"], bad["reason"]
    raise AssertionError


def _records(plan: Plan, folder: Path) -> Iterator[tuple[Planned, Record]]:
    """What is known of all images, those that could not be read among them, shard by shard."""
    for number, planned in enumerate(plan.shards):
        record = read_record(folder, number)
        assert record is not None, "all shards are there"
        yield planned, record


def _manifest(source: Source, plan: Plan, folder: Path, form: str) -> Iterator[Any]:
    """Those that are there, a table a shard."""
    import pyarrow as pa
    import pyarrow.compute as pc

    index = dict.fromkeys(SPLITS, 0)
    nameless = [None] * len(source.classes)
    class_names = pa.array(source.class_names or nameless, pa.string())
    for planned, record in _records(plan, folder):
        if form not in record.shards:
            continue
        table = record.table.filter(pc.is_null(record.table["reason"]))
        first = index[planned.split]
        index[planned.split] += len(table)
        table = table.append_column("index", pa.array(np.arange(first, first + len(table))))
        table = table.append_column("offset", table[f"{form}_offset"])
        table = table.append_column("class_name", class_names.take(table["label"]))
        shard = pa.array([record.shards[form].file] * len(table))
        yield table.append_column("shard", shard)


def _summarise(
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
