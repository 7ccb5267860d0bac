"""Source → decode, crop, encode → shards: the road every layout takes to every format.

The source is read once, front to back, and the stored images wait in a staging folder in the
output folder. From there they are written in an order that depends on seed and names alone; every
format gets the same images in the same order, cut into shards at the same places. All that was done
stays in OUT/.partial until the sets are whole, so the same command goes on where a killed one was.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import staging
from data_prep.encode import Recipe, encode_items
from data_prep.placement import cut_shards, place_images
from data_prep.records import Settings, summarise, versions, write_records
from data_prep.shards import WRITERS, Sample
from data_prep.sources import SPLITS, Source
from data_prep.staging import Journal, Staging
from tarflow_dist.errors import UserError
from tarflow_dist.files import lock_folder, publish_folder, read_json
from tarflow_dist.telemetry.progress import Progress

PARTIAL = ".partial"
ERRORS_ALWAYS_ALLOWED = 10


def prepare(
    source: Source, out: Path, formats: Sequence[str], settings: Settings, *, workers: int = 1
) -> dict[str, Any]:
    """Writes `out`/FORMAT, a whole set, for each of `formats` (keys of WRITERS), and returns the
    summary that lies in each. A set appears whole or not at all; an unfinished run's work is gone
    on with, and what this very preparation has finished stays as it is.

    Raises:
        UserError: another set is there already, or another run or another run's work; `out` can't
            be written to; too many images are bad.
    """
    about = _about(source, formats, settings)
    try:
        if not _is_begun(out) and _is_finished(out, formats, about):
            return _read_summary(out / formats[0])
        out.mkdir(parents=True, exist_ok=True)
        with lock_folder(out):
            if _is_begun(out) or not _is_finished(out, formats, about):
                staging.begin(out / PARTIAL, about)
                missing = [form for form in formats if not (out / form).exists()]
                if missing:
                    _write_sets(source, out, missing, settings, workers, about)
                staging.remove(out / PARTIAL)
        return _read_summary(out / formats[0])
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror or error}") from error


def _is_begun(out: Path) -> bool:
    return (out / PARTIAL / "begun.json").exists()


def _is_finished(out: Path, formats: Sequence[str], about: dict[str, Any]) -> bool:
    """Whether the preparation that is `about` has written all of `formats`.

    Raises:
        UserError: there are sets of another one.
    """
    if (out / "summary.json").exists():
        raise UserError(f"{out} is a set already: choose another folder")
    there = [form for form in formats if (out / form).exists()]
    for form in there:
        if _made_by(out / form) != _digest(about):
            raise UserError(f"{out / form} already holds a set: remove it or choose another")
    if there and len(there) < len(formats):
        raise UserError(f"{out / there[0]} already holds a set: remove it or choose another")
    return bool(there)


def _made_by(folder: Path) -> str | None:
    try:
        return read_json(folder / "timing.json")["preparation"]
    except (OSError, ValueError, LookupError, TypeError):  # of another program, or version
        return None


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _read_summary(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "summary.json")
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/summary.json is damaged: remove the set") from error


def _about(source: Source, formats: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What must not change between the starts of a run."""
    about = {name: value for name, value in settings.identity().items() if name != "max_errors"}
    return {
        **about,
        "formats": list(formats),
        "name": source.name,
        "layout": source.layout,
        "source": source.fingerprint(),
        "versions": versions(),
    }


def _write_sets(
    source: Source,
    out: Path,
    formats: Sequence[str],
    settings: Settings,
    workers: int,
    about: dict[str, Any],
) -> None:
    began = time.monotonic()
    partial = out / PARTIAL
    images = Staging(partial)
    try:
        before = images.done
        _encode_all(source, settings, images, workers)
        placed = place_images(images, settings.seed)
        shards = {split: cut_shards(placed, split, settings.shard_bytes) for split in SPLITS}
        summary = summarise(source, settings, placed)
        for form in formats:
            part = partial / form
            part.mkdir(exist_ok=True)
            journals = {split: Journal(partial / f"{form}-{split}.jsonl") for split in SPLITS}
            for split, journal in journals.items():
                _write_split(part, form, source, settings, images, placed, shards[split], journal)
                journal.close()
            write_records(part, source, images, placed, shards, journals, summary)
            timing = {
                "seconds": round(time.monotonic() - began, 1),
                "workers": workers,
                "images_before": before,
                "preparation": _digest(about),
            }
            (part / "timing.json").write_text(json.dumps(timing) + "\n")
        for form in formats:
            publish_folder(partial / form, out / form)
    finally:
        images.close()


def _encode_all(source: Source, settings: Settings, images: Staging, workers: int) -> None:
    """Spools what is not there yet; sets aside what can't be read.

    Raises:
        UserError: that is too much of it.
    """
    total = len(source)
    allowed = min(max(int(settings.max_errors * total), ERRORS_ALWAYS_ALLOWED), total - 1)
    recipe = Recipe(
        settings.size, source.channels, settings.crop, settings.encode, settings.max_pixels
    )
    results = encode_items(source.items(images.done), recipe, workers)
    try:
        with Progress("prepare", total, start=images.done) as progress:
            _check_errors(images, allowed, total)
            for item, result in results:
                images.add(item, result)
                _check_errors(images, allowed, total)
                progress.update(1)
    finally:
        results.close()
        images.commit()


def _check_errors(images: Staging, allowed: int, total: int) -> None:
    if images.rejected > allowed:
        images.commit()
        first = next(row for row in images.journal if row["reason"])
        raise UserError(
            f"{images.rejected} of {total} images can't be read, first {first['source']} "
            f"({first['reason']}): raise --max-errors to go on without them, or mend them and "
            f"remove {images.journal.file.parent} to start over"
        )


def _write_split(
    folder: Path,
    form: str,
    source: Source,
    settings: Settings,
    images: Staging,
    placed: np.ndarray,
    shards: list[np.ndarray],
    journal: Journal,
) -> None:
    """Writes the shards that `journal` has not yet, and the index of all."""
    split = journal.file.stem.rpartition("-")[2]
    size = settings.size
    writer = WRITERS[form](
        folder / split,
        name=source.name,
        encode=settings.encode,
        shape=(size, size, source.channels) if size else None,
        done=journal,
    )
    done = journal.lines
    index = sum(map(len, shards[:done]))
    total = sum(map(len, shards))
    with Progress(f"write {form} {split}", total, start=index) as progress:
        for chosen in shards[done:]:
            samples = _read_staged(index, source, images, placed[chosen])
            journal.append(writer.write(samples))
            index += len(chosen)
            progress.update(len(chosen))
    writer.finish()


def _read_staged(
    index: int, source: Source, images: Staging, placed: np.ndarray
) -> Iterator[Sample]:
    for row in images.rows(placed):
        data = images.read(row["offset"], row["bytes"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise staging.damaged(images.journal.file.parent)
        label = row["label"]
        yield Sample(index, label, source.classes[label], row["source"], row["kind"], data)
        index += 1
