"""`python -m data_prep show OUT`: a finished set at a glance, in a table and a contact sheet."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data_prep.images import to_8bit
from data_prep.sources.names import SPLITS, say_passed_over
from data_prep.sources.storage import damage_named
from data_prep.verify import decode, find_sets, on_disk
from tarflow_dist.data.shards import Summary
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside, open_regular, read_json, regular, write_whole
from tarflow_dist.models.classes import some
from tarflow_dist.telemetry.pictures import picture_grid

ROWS, COLUMNS = 10, 10
CELL = 128
"""Pixels of a picture on the sheet: smaller ones are magnified as far as they go in whole steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="a set, or a folder with mds/ or wds/ in it")
    parser.add_argument(
        "--sheet", type=Path, help="where the pictures go (default OUT/contact-sheet.png)"
    )


def run(args: argparse.Namespace) -> None:
    import pyarrow.parquet as pq

    out = on_disk(args.out)
    folder = find_sets(out)[0]
    see = f"see `python -m data_prep verify {shlex.quote(str(folder))}`"
    with damage_named(f"{folder} is damaged", see):
        summary = read_json(folder / "summary.json")
        Summary.of(summary)
        manifest = pq.read_table(regular(folder / "manifest.parquet"))
        for name, value in table(summary, manifest):
            print(f"{name:<14}{value}")
        sheet = contact_sheet(folder, summary, manifest)
    file = args.sheet or out / "contact-sheet.png"
    try:
        with write_whole(file) as part:
            sheet.save(part, "PNG")
    except OSError as error:
        raise UserError(
            f"can't write {file} ({error.strerror}): choose another place with --sheet"
        ) from error
    print(f"{'pictures':<14}{file}")


def table(summary: dict[str, Any], manifest: Any) -> Iterator[tuple[str, str]]:
    """The summary's lines: what, and its value."""
    settings, classes = summary["settings"], summary["classes"]
    side = summary["image_size"]
    yield "set", summary["name"]
    yield "images", ", ".join(f"{count:,} {split}" for split, count in summary["images"].items())
    names = [_readable(summary, label) for label in range(len(classes))]
    yield "classes", f"{len(names):,}: {some(names, 5)}"
    for split in SPLITS:
        counts = summary["images_per_class"][split]
        yield f"  in {split}", f"{min(counts):,} to {max(counts):,} a class"
    size = f"{side}x{side}" if side else "their own sizes"
    yield "pixels", f"{size}, {'grey' if summary['channels'] == 1 else 'RGB'}"
    stored = sum(manifest["bytes"].to_pylist())
    each = f"{stored / max(len(manifest), 1) / 1e3:.1f} kB an image"
    yield "stored", f"{stored / 1e6:,.1f} MB of {settings['encode']}, {each}"
    yield "set aside", f"{summary['errors']:,} that could not be read"
    if passed_over := summary.get("passed_over"):
        yield "passed over", say_passed_over(passed_over).partition(": ")[2]
    yield "settings", ", ".join(f"{key} {value}" for key, value in settings.items())
    yield "versions", ", ".join(f"{key} {value}" for key, value in summary["versions"].items())


def _readable(summary: dict[str, Any], label: int) -> str:
    """The first of a class's names in words if there are such, or else its own."""
    names = summary.get("class_names")
    return str(names[label]).partition(",")[0] if names else str(summary["classes"][label])


def contact_sheet(folder: Path, summary: dict[str, Any], manifest: Any) -> Image.Image:
    """A row of pictures for each of some classes, spread evenly over all; their names before."""
    import pyarrow.compute as pc

    count = len(summary["classes"])
    labels = sorted({row * count // min(ROWS, count) for row in range(min(ROWS, count))})
    cells = np.full((len(labels), COLUMNS, CELL, CELL, 3), 255, np.uint8)
    for row, label in enumerate(labels):
        of_class = manifest.filter(pc.equal(manifest["label"], label)).slice(0, COLUMNS)
        for column, image in enumerate(of_class.to_pylist()):
            with open(open_regular(inside(folder, image["shard"])), "rb") as file:
                file.seek(image["offset"])
                picture = to_8bit(decode(file.read(image["bytes"]), summary), 3)
            picture.thumbnail((CELL, CELL))
            factor = CELL // max(picture.size)
            shown = ImageOps.scale(picture, factor, Image.Resampling.NEAREST)
            top, left = (CELL - shown.height) // 2, (CELL - shown.width) // 2
            cells[row, column, top:, left:][: shown.height, : shown.width] = shown
    return picture_grid(list(cells), [_readable(summary, label) for label in labels])
