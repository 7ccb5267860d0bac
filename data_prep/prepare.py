"""Source → plan → shards → sets: the road every layout takes to every format.

First it is planned which images make which shard. Then processes, on as many nodes as there are,
make the shards, each whole from the source: see shard_maker. What is done waits in OUT/.partial,
so the same command goes on where a killed one was. Once all shards are there, the first rank
writes what the sets say of themselves, and publishes them.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.metadata import describe_sets, first_error
from data_prep.plan import BEGUN, Plan, begin
from data_prep.settings import Settings, versions
from data_prep.shard_maker import DONE, ShardMaker
from data_prep.sources import Source
from data_prep.sources.storage import damage_named
from data_prep.workers import map_in_order
from tarflow_dist.errors import UserError
from tarflow_dist.files import lock_folder, publish_folder, read_json
from tarflow_dist.telemetry.progress import Progress

PARTIAL = ".partial"
ERRORS_ALWAYS_ALLOWED = 10
SECONDS_BETWEEN_LOOKS = 1.0


def prepare(
    source: Source,
    out: Path,
    formats: Sequence[str],
    settings: Settings,
    *,
    workers: int = 1,
    world_size: int = 1,
) -> dict[str, Any]:
    """Writes `out`/FORMAT, a whole set, for each of `formats` (keys of FORMATS), and returns the
    summary that lies in each. A set appears whole or not at all; an unfinished run's work is gone
    on with, and what this very preparation has finished stays as it is.

    Args:
        world_size: ranks that work on it together, on disks that they share. This is the first;
            the others call `help_prepare`.

    Raises:
        UserError: another set is there already, or another run or another run's work; `out` can't
            be written to; too many images are bad.
    """
    about = {
        **_settings(formats, settings),
        "name": source.name,
        "layout": source.layout,
        "source": source.fingerprint(),
    }
    partial = out / PARTIAL
    try:
        if (partial / BEGUN).exists() or not _is_finished(out, formats, about):
            out.mkdir(parents=True, exist_ok=True)
            with lock_folder(out):
                begin(partial, source, settings, about)
                missing = [form for form in formats if not (out / form).exists()]
                if missing:
                    maker = ShardMaker(partial, source.path, settings, missing)
                    _write_sets(source, maker, out, about, workers, world_size)
                (partial / BEGUN).unlink()  # the rest is known to be none without it
        if partial.exists():
            shutil.rmtree(partial)
        file = out / formats[0] / "summary.json"
        with damage_named(f"{file} is damaged", "remove the set"):
            return read_json(file)
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror or error}") from error


def help_prepare(
    path: Path,
    out: Path,
    formats: Sequence[str],
    settings: Settings,
    *,
    workers: int,
    rank: int,
    world_size: int,
) -> None:
    """Makes a later rank's share of the shards of `prepare`, of the source at `path`.

    Raises:
        UserError: as `prepare`; another preparation has begun in `out`.
    """
    partial = out / PARTIAL
    while not (partial / BEGUN).exists():
        if all((out / form).exists() for form in formats):
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        Plan(partial).check(_settings(formats, settings))
        maker = ShardMaker(partial, path, settings, formats)
        _make_share(maker, workers, rank, world_size)
    except (OSError, UserError) as error:
        if not (partial / BEGUN).exists():  # all was done, and the first rank has published it
            return
        if isinstance(error, UserError):
            raise
        raise UserError(f"can't write to {out}: {error.strerror or error}") from error


def _settings(formats: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What must not change between the starts of a run, and is alike on all ranks."""
    return {**settings.identity(), "formats": list(formats), "versions": versions()}


def _is_finished(out: Path, formats: Sequence[str], about: dict[str, Any]) -> bool:
    """Whether the preparation that is `about` has written all of `formats`.

    Raises:
        UserError: there are sets of another one.
    """
    if (out / "summary.json").exists():
        raise UserError(f"{out} is a set already: choose another folder")
    there = [form for form in formats if (out / form).exists()]
    for form in there:
        if len(there) < len(formats) or _made_by(out / form) != _digest(about):
            raise UserError(f"{out / form} already holds a set: remove it or choose another")
    return bool(there)


def _made_by(folder: Path) -> str | None:
    try:
        return read_json(folder / "timing.json")["preparation"]
    except (OSError, ValueError, LookupError, TypeError):  # of another program, or version
        return None


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _write_sets(
    source: Source,
    maker: ShardMaker,
    out: Path,
    about: dict[str, Any],
    workers: int,
    world_size: int,
) -> None:
    began, partial = time.monotonic(), maker.folder
    before = _make_share(maker, workers, 0, world_size)
    if world_size > 1:
        _wait_for_others(partial)
        _make_share(maker, workers, 0, 1)  # finds them, or what a crash left of one
    describe_sets(source, maker.settings, partial, maker.formats)
    timing = {
        "seconds": round(time.monotonic() - began, 1),
        "workers": workers,
        "ranks": world_size,
        "images_before": before,
        "preparation": _digest(about),
    }
    for form in maker.formats:
        (partial / form / "timing.json").write_text(json.dumps(timing) + "\n")
    for form in maker.formats:
        publish_folder(partial / form, out / form)


def _make_share(maker: ShardMaker, workers: int, rank: int, world_size: int) -> int:
    """Makes every `world_size`-th shard that is planned, from the `rank`-th on, and returns how
    many images of them were there before.

    Raises:
        UserError: too many images can't be read.
    """
    plan = Plan(maker.folder)
    total = sum(shard.images for shard in plan.shards)
    allowed = min(max(int(maker.settings.max_errors * total), ERRORS_ALWAYS_ALLOWED), total - 1)
    numbers = range(rank, len(plan.shards), world_size)
    before = bad = 0
    results = map_in_order(maker, numbers, workers)
    try:
        with Progress("prepare", sum(plan.shards[i].images for i in numbers)) as progress:
            for number, (its_bad, was_there) in zip(numbers, results, strict=True):
                images = plan.shards[number].images
                before += images if was_there else 0
                bad += its_bad
                if bad > allowed:
                    name, reason = first_error(maker.folder)
                    raise UserError(
                        f"{bad} of {total} images can't be read, first {name} ({reason}): raise "
                        "--max-errors to go on without them, or mend them and remove "
                        f"{maker.folder} to start over"
                    )
                progress.update(images)
    finally:
        results.close()
    return before


def _wait_for_others(partial: Path) -> None:
    """Until all shards are there. A rank that is lost ends the job, which is started anew."""
    planned, said = len(Plan(partial).shards), False
    while (there := sum(1 for _ in (partial / DONE).glob("*.json"))) < planned:
        if not said:
            print(f"{planned - there} shards are still with other ranks", file=sys.stderr)
        said = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
