"""What is written once, when all shards are there: indexes, manifest, errors, summary."""

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.plan import Plan, Planned
from data_prep.records import (
    ERRORS,
    MANIFEST,
    Settings,
    image_table,
    summarise,
    write_table,
)
from data_prep.shard_maker import Record, read_record
from data_prep.shards import Shard, make_format
from data_prep.sources import Source
from data_prep.sources.names import SPLITS
from tarflow_dist.errors import UserError


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
    for planned, record, table in _tables(source, plan, folder):
        for form in record.shards.keys() & shards.keys():
            shards[form][planned.split].append(record.shards[form])
        is_bad = pc.is_valid(table["reason"])
        for counts, chosen in ((stored, pc.invert(is_bad)), (bad, is_bad)):
            labels = table["label"].filter(chosen).to_numpy()
            counts[planned.split] += np.bincount(labels, minlength=len(source.classes))
    for split in SPLITS:
        if not stored[split].any():
            raise UserError(f"no image of {split} could be read")
    summary = summarise(source, settings, stored, bad)
    for form in formats:
        writer = make_format(form, plan.name, settings.encode, settings.size, plan.channels)
        writer.write_index(folder / form, shards[form])
        manifest = _manifest(source, plan, folder, form)
        write_table(folder / form / "manifest.parquet", manifest, MANIFEST)
        tables = (table for *_, table in _tables(source, plan, folder))
        errors = (table.filter(pc.is_valid(table["reason"])) for table in tables)
        write_table(folder / form / "errors.parquet", errors, ERRORS)
        (folder / form / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def first_error(folder: Path) -> tuple[str, str]:
    """An image that could not be read, of the shards that are done, and why."""
    plan = Plan(folder)
    for number, _ in enumerate(plan.shards):
        record = read_record(folder, number)
        if record and record.bad:
            reasons = _rows(record)["reason"].to_pylist()
            at = next(i for i, reason in enumerate(reasons) if reason)
            return plan.items(number)[at].name, reasons[at]
    raise AssertionError


def _rows(record: Record) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(BytesIO(record.rows), use_threads=False)


def _tables(source: Source, plan: Plan, folder: Path) -> Iterator[tuple[Planned, Record, Any]]:
    """What became of all images, a table a shard."""
    for number, planned in enumerate(plan.shards):
        record = read_record(folder, number)
        assert record is not None, "all shards are there"
        split, first = planned.split, planned.first
        table = image_table(source, split, first, plan.table(number), _rows(record))
        yield planned, record, table


def _manifest(source: Source, plan: Plan, folder: Path, form: str) -> Iterator[Any]:
    """Those that are there, a table a shard."""
    import pyarrow as pa
    import pyarrow.compute as pc

    index = dict.fromkeys(SPLITS, 0)
    for planned, record, table in _tables(source, plan, folder):
        if form not in record.shards:
            continue
        table = table.filter(pc.is_null(table["reason"]))
        first = index[planned.split]
        index[planned.split] += len(table)
        table = table.append_column("index", pa.array(np.arange(first, first + len(table))))
        table = table.append_column("offset", table[f"{form}_offset"])
        shard = pa.array([record.shards[form].file] * len(table))
        yield table.append_column("shard", shard)
