"""`python -m data_prep verify OUT`: reads a finished set back and says what is wrong, and where."""

import argparse
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.formats import IMAGE_HASHES, Format, Shard, digest, make_format
from data_prep.images import open_image
from data_prep.settings import HONEST_PIXELS
from data_prep.sources.names import SPLITS
from data_prep.upload import is_remote
from data_prep.workers import map_in_order
from tarflow_dist.data.images import decode_image
from tarflow_dist.data.shards import COLUMNS as READ_COLUMNS
from tarflow_dist.data.shards import Summary, check_types
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside, read_json, read_regular, regular
from tarflow_dist.telemetry.progress import Progress

POSITION = "position"
"""What shards count images by, where the manifest has it; before there was one, by `index`."""
COLUMNS = READ_COLUMNS | dict.fromkeys(("source", "class", "kind", "sha256"), "string")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="a set, or a folder with mds/ or wds/ in it")
    parser.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each shard or file that is wrong, and returns the exit code."""
    count = 0
    for line in verify(on_disk(args.out), workers=args.workers):
        count += 1
        print(line, flush=True)
    if count:
        print(f"{args.out}: {'1 thing is' if count == 1 else f'{count} things are'} wrong")
        return 1
    print(f"{args.out}: whole")
    return 0


def on_disk(out: str) -> Path:
    """Raises `UserError` if `out` is an object store's address."""
    if is_remote(out):
        raise UserError(f"{out} is in an object store: copy it to a disk, and give that folder")
    return Path(out)


def find_sets(out: Path) -> list[Path]:
    """`out` if it is a set, or the sets in it.

    Raises:
        UserError: there are none.
    """
    if any((out / name).exists() for name in (*SPLITS, "summary.json", "manifest.parquet")):
        return [out]
    sets = [out / form for form in ("mds", "wds") if (out / form).is_dir()]
    if not sets:
        raise UserError(f"{out} holds no set: give a folder that data_prep wrote")
    return sets


def verify(out: Path, *, workers: int = 1) -> Iterator[str]:
    """One line for each shard or file that is wrong in the set or sets in `out`."""
    for folder in find_sets(out):
        prefix = "" if folder == out else f"{folder.name}/"
        yield from (prefix + line for line in _verify_set(folder, workers))


@dataclass(frozen=True)
class Job:
    """A shard to be read back."""

    folder: Path
    file: str
    listed: Shard | None
    """What the format's index says of it, if it does."""
    rows: Any
    """Its part of the manifest, a pyarrow table."""
    summary: dict[str, Any]
    writer: Format


def _verify_set(folder: Path, workers: int) -> Iterator[str]:
    import pyarrow.parquet as pq

    name = ""
    try:
        name = "summary.json"
        summary = read_json(folder / name)
        Summary.of(summary)
        name = "errors.parquet"
        errors = pq.read_table(regular(folder / name), page_checksum_verification=True).num_rows
        name = "manifest.parquet"
        file = regular(folder / name)
        columns = COLUMNS | ({POSITION: "int64"} if POSITION in pq.read_schema(file).names else {})
        rows = pq.read_table(file, columns=list(columns), page_checksum_verification=True)
        rows.validate(full=True)
        check_types(rows, columns)
        wrong = list(_check_records(summary, rows, errors))
        jobs = [job for split in SPLITS for job in _list_split(folder, split, rows, summary, wrong)]
    except Exception as error:  # whatever damage does to a parser
        yield f"{name}: {_why(error)}, so that nothing else can be told"
        return
    yield from wrong
    with Progress("verify", len(rows)) as progress:
        problems = map_in_order(_check_shard, jobs, workers)
        for job, problem in zip(jobs, problems, strict=True):
            progress.update(len(job.rows))
            if problem:
                yield f"{job.file}: {problem}"


def _check_records(summary: dict[str, Any], rows: Any, errors: int) -> Iterator[str]:
    """Holds summary and manifest against each other."""
    classes = summary["classes"]
    if errors != summary["errors"]:
        yield f"errors.parquet: {errors} rows, but summary.json counts {summary['errors']}"
    labels, split_of = rows["label"].to_numpy(), np.array(rows["split"].to_pylist(), str)
    outside = int(((labels < 0) | (labels >= len(classes))).sum())
    if outside:
        yield f"manifest.parquet: {outside} labels are not among the {len(classes)} classes"
        return
    if rows["class"].to_pylist() != [classes[label] for label in labels]:
        yield "manifest.parquet: labels and class names are not those of summary.json"
    for split in SPLITS:
        here = split_of == split
        counts = np.bincount(labels[here], minlength=len(classes)).tolist()
        if counts != summary["images_per_class"][split] or sum(counts) != summary["images"][split]:
            yield f"manifest.parquet: its counts of {split} images are not those of summary.json"
        if not np.array_equal(rows["index"].to_numpy()[here], np.arange(sum(counts))):
            yield f"manifest.parquet: the indexes of {split} do not count from 0 on"
        if (
            POSITION in rows.column_names
            and (np.diff(rows[POSITION].to_numpy()[here], prepend=-1) < 1).any()
        ):
            yield f"manifest.parquet: the positions of {split} do not rise from 0 on"


def _list_split(
    folder: Path, split: str, rows: Any, summary: dict[str, Any], wrong: list[str]
) -> list[Job]:
    """The shards of a split by its manifest; adds to `wrong` in what the format's index, or the
    folder, differs from it."""
    import pyarrow.compute as pc

    is_wds = (folder / "_info.json").exists() or any((folder / split).glob("*.tar"))
    writer = make_format(
        "wds" if is_wds else "mds",
        summary["name"],
        summary["settings"]["encode"],
        summary["image_size"],
        summary["channels"],
    )
    try:
        listed = {shard.file: shard for shard in writer.read_index(folder, split)}
    except Exception as error:  # whatever damage does to a parser
        wrong.append(f"{split}: its index is {_why(error)}")
        listed = {}
    rows = rows.filter(pc.equal(rows["split"], split))
    runs = pc.run_end_encode(rows["shard"].combine_chunks())
    files, ends = runs.values.to_pylist(), runs.run_ends.to_pylist()
    jobs = []
    for file, start, end in zip(files, [0, *ends], ends, strict=False):
        # `take` copies: a mere slice would bring the whole table along to another process
        its_rows = rows.take(np.arange(start, end))
        jobs.append(Job(folder, file, listed.get(file), its_rows, summary, writer))
    if listed and list(listed) != files:
        wrong.append(f"{split}: the shards of its index are not those of manifest.parquet")
    known = {*listed, *files, f"{split}/index.json"}
    for entry in sorted((folder / split).iterdir()) if (folder / split).is_dir() else ():
        if f"{split}/{entry.name}" not in known:
            wrong.append(f"{split}/{entry.name}: belongs to no set")
    return jobs


def _check_shard(job: Job) -> str:
    """What is wrong with a shard; nothing if it is whole."""
    rows = job.rows.to_pylist()
    try:
        data = read_regular(inside(job.folder, job.file))
    except (OSError, ValueError) as error:
        return _gist(error)
    wrong = []
    if job.listed:
        if len(data) != job.listed.bytes:
            wrong.append(f"{len(data)} bytes long and not {job.listed.bytes}")
        wrong += [
            f"its {kind} is not that of the index"
            for kind, found in job.writer.hashes(data).items()
            if job.listed.hashes.get(kind) != found
        ]
        if job.listed.images != len(rows):
            wrong.append(f"{job.listed.images} images in the index and {len(rows)} in the manifest")
    bad = []
    for row in rows:
        row["data"] = data[row["offset"] : row["offset"] + row["bytes"]]
        if problem := _check_image(row, job.summary):
            bad.append(f"image {row['index']} ({row['source']}) {problem}")
        if bad:  # a damaged manifest's images may be more than the memory
            del row["data"]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        wrong.append(bad[0] + more)
    elif odd := _check_rest(data, rows, job.writer):
        wrong.append(odd)
    return "; ".join(wrong)


def _check_image(row: dict[str, Any], summary: dict[str, Any]) -> str:
    for kind in IMAGE_HASHES:
        if digest(kind, row["data"]) != row[kind]:
            return f"has not the manifest's {kind}"
    try:
        decode(row["data"], summary)
    except Exception as error:  # decoders raise of every kind
        return f"can't be decoded ({_gist(error)})"
    return ""


def _check_rest(data: bytes, rows: list[dict[str, Any]], writer: Format) -> str:
    """What is wrong with a shard besides its images: written once more, as the manifest has them,
    these must give the same bytes."""
    offsets = [row["offset"] for row in rows]
    try:
        written = writer.pack([{POSITION: row["index"], **row} for row in rows])
    except Exception as error:  # whatever a manifest may say
        return f"the manifest has what can't be stored ({_gist(error)})"
    if written == (data, offsets):
        return ""
    pairs = zip(data, written[0], strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(data))
    image = rows[max(bisect(offsets, at) - 1, 0)]
    return (
        f"labels, names or places are not the manifest's from byte {at} on, at image "
        f"{image['index']} ({image['source']})"
    )


def decode(data: bytes, summary: dict[str, Any]) -> Image.Image:
    """A stored image's bytes as a picture of the summary's size and channels.

    Raises:
        Exception: of any kind, it is no such image.
    """
    if summary["settings"]["encode"] == "keep":
        image = open_image(data, summary["settings"].get("max_pixels", HONEST_PIXELS))
        image.load()
        return image
    return decode_image(
        data,
        encode=summary["settings"]["encode"],
        side=summary["image_size"],
        channels=summary["channels"],
    )


def _why(error: Exception) -> str:
    state = "not to be read" if isinstance(error, PermissionError) else "missing or damaged"
    return f"{state} ({_gist(error)})"


def _gist(error: Exception) -> str:
    """An error on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
