"""Source → decode, crop, encode → shards: the road every layout takes to every format.

The source is read once, front to back, and the encoded images wait in an unnamed scratch file in
the output folder. From there they are written in an order that depends on seed and names alone;
every format gets the same images in the same order, cut into shards at the same places.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from PIL import UnidentifiedImageError

from data_prep.images import prepare_image
from data_prep.records import Prepared, Rejected, Settings, summarise, write_records
from data_prep.shards import WRITERS, Sample
from data_prep.sources import SPLITS, Item, Source, shuffle_key
from tarflow_dist.errors import UserError
from tarflow_dist.files import publish_folder
from tarflow_dist.telemetry.progress import Progress

ERRORS_ALWAYS_ALLOWED = 10

Shards = list[list[Prepared]]


def prepare(
    source: Source, out: Path, formats: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """Writes `out`/FORMAT, a whole set, for each of `formats` (keys of WRITERS), and returns the
    summary that lies in each. A set appears whole or not at all.

    Raises:
        UserError: a set is there already, `out` can't be written to, or too many images are bad.
    """
    for form in formats:
        if os.path.exists(out / form):
            raise UserError(f"{out / form} already holds a set: remove it or choose another")
    parts = {form: out / f".{form}.partial" for form in formats}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out) as scratch:
            prepared, rejected = _encode_all(source, settings, scratch)
            splits = {split: _arrange(prepared, split, settings) for split in SPLITS}
            summary = summarise(source, settings, prepared, rejected)
            for form, part in parts.items():
                shutil.rmtree(part, ignore_errors=True)  # what a killed run left
                part.mkdir()
                files = {
                    split: WRITERS[form](
                        part / split,
                        _read_back(shards, source, scratch, f"write {form} {split}"),
                        name=source.name,
                        encoding=settings.encoding,
                    )
                    for split, shards in splits.items()
                }
                write_records(part, source, splits, files, rejected, summary)
        for form, part in parts.items():
            publish_folder(part, out / form)
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror or error}") from error
    finally:
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)
    return summary


def _encode_all(
    source: Source, settings: Settings, scratch: BinaryIO
) -> tuple[list[Prepared], list[Rejected]]:
    """Puts every image file into `scratch`, and notes where; sets aside what can't be read.

    Raises:
        UserError: that is too much of it.
    """
    prepared: list[Prepared] = []
    rejected: list[Rejected] = []
    offset, total = 0, len(source)
    allowed = min(max(int(settings.max_errors * total), ERRORS_ALWAYS_ALLOWED), total - 1)
    with Progress("prepare", total) as progress:
        for item in source:
            data = encode_item(item, source.channels, settings)
            if isinstance(data, Rejected):
                rejected.append(data)
            else:
                scratch.write(data)
                sha256 = hashlib.sha256(data).hexdigest()
                prepared.append(
                    Prepared(item.split, item.label, item.name, offset, len(data), sha256)
                )
                offset += len(data)
            if len(rejected) > allowed:
                raise UserError(
                    f"{len(rejected)} of {total} images can't be read, first {rejected[0].name} "
                    f"({rejected[0].reason}): mend or remove them, or raise --max-errors"
                )
            progress.update(1)
    scratch.flush()
    return prepared, rejected


def encode_item(item: Item, channels: int, settings: Settings) -> bytes | Rejected:
    """One item's image file, or why there is none: a function of its arguments alone."""
    try:
        return prepare_image(
            item.content,
            size=settings.size,
            channels=channels,
            crop=settings.crop,
            encoding=settings.encoding,
        )
    except UnidentifiedImageError:
        reason = "not an image that Pillow knows"
    except Exception as error:  # decoders raise of every kind: whatever it is, it's this image's
        reason = f"{type(error).__name__}: {error}"
    return Rejected(item.split, item.label, item.name, reason)


def _arrange(prepared: list[Prepared], split: str, settings: Settings) -> Shards:
    """Shuffles the images of a split and cuts them into shards."""
    images = [image for image in prepared if image.split == split]
    images.sort(key=lambda image: shuffle_key(settings.seed, "order", image.name))
    shards: Shards = []
    room = 0
    for image in images:
        if not shards or image.size > room:
            shards.append([])
            room = settings.shard_bytes
        shards[-1].append(image)
        room -= image.size
    return shards


def _read_back(
    shards: Shards, source: Source, scratch: BinaryIO, label: str
) -> Iterator[list[Sample]]:
    index = 0
    with Progress(label, sum(map(len, shards))) as progress:
        for shard in shards:
            samples = []
            for image in shard:
                data = os.pread(scratch.fileno(), image.size, image.offset)
                class_name = source.classes[image.label]
                samples.append(Sample(index, image.label, class_name, image.name, data))
                index += 1
            yield samples
            progress.update(len(shard))
