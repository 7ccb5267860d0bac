"""`python -m data_prep show OUT`: a finished set at a glance, in a table and a contact sheet."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data_prep.images import to_8bit
from data_prep.sources.names import SPLITS, say_passed_over
from data_prep.verify import decode, find_sets, on_disk
from tarflow_dist.data.shards import Summary
from tarflow_dist.errors import REFUSED_BY_MACHINE, UserError
from tarflow_dist.files import inside, open_regular, read_json, regular, write_whole
from tarflow_dist.models.classes import some
from tarflow_dist.telemetry.pictures import fitted, font

ROWS, COLUMNS = 10, 10
CELL = 128
"""Pixels of a picture on the sheet: smaller ones are magnified as far as they go in whole steps."""
GAP, NAMES = 4, 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="a set, or a folder with mds/ or wds/ in it")
    parser.add_argument(
        "--sheet", type=Path, help="where the pictures go (default OUT/contact-sheet.png)"
    )


def run(args: argparse.Namespace) -> None:
    import pyarrow.parquet as pq

    out = on_disk(args.out)
    folder = find_sets(out)[0]
    try:
        summary = read_json(folder / "summary.json")
        Summary.of(summary)
        manifest = pq.read_table(regular(folder / "manifest.parquet"))
        for name, value in table(summary, manifest):
            print(f"{name:<14}{value}")
        sheet = contact_sheet(folder, summary, manifest)
    except Exception as error:  # whatever damage does to a parser
        if isinstance(error, OSError) and error.errno in REFUSED_BY_MACHINE:
            raise
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}: {error}): see `python -m data_prep "
            f"verify {shlex.quote(str(folder))}`"
        ) from error
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
    yield (
        "stored",
        f"{stored / 1e6:,.1f} MB of {settings['encode']}, {_kilobytes(stored, manifest)}",
    )
    yield "set aside", f"{summary['errors']:,} that could not be read"
    if passed_over := summary.get("passed_over"):
        yield "passed over", say_passed_over(passed_over).partition(": ")[2]
    yield "settings", ", ".join(f"{key} {value}" for key, value in settings.items())
    yield "versions", ", ".join(f"{key} {value}" for key, value in summary["versions"].items())


def _kilobytes(stored: int, manifest: Any) -> str:
    return f"{stored / max(len(manifest), 1) / 1e3:.1f} kB an image"


def _readable(summary: dict[str, Any], label: int) -> str:
    """The first of a class's names in words if there are such, or else its own."""
    names = summary.get("class_names")
    return str(names[label]).partition(",")[0] if names else str(summary["classes"][label])


def contact_sheet(folder: Path, summary: dict[str, Any], manifest: Any) -> Image.Image:
    """A row of pictures for each of some classes, spread evenly over all; their names before."""
    import pyarrow.compute as pc

    count = len(summary["classes"])
    labels = sorted({row * count // min(ROWS, count) for row in range(min(ROWS, count))})
    step = CELL + GAP
    sheet = Image.new("RGB", (NAMES + COLUMNS * step, len(labels) * step + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    letters = font(16)
    for row, label in enumerate(labels):
        top = GAP + row * step
        draw.text(
            (GAP * 2, top + CELL // 2),
            fitted(_readable(summary, label), letters, NAMES - 4 * GAP),
            "black",
            letters,
            anchor="lm",
        )
        of_class = manifest.filter(pc.equal(manifest["label"], label)).slice(0, COLUMNS)
        for column, image in enumerate(of_class.to_pylist()):
            with open(open_regular(inside(folder, image["shard"])), "rb") as file:
                file.seek(image["offset"])
                picture = _sized(to_8bit(decode(file.read(image["bytes"]), summary), 3))
            left = NAMES + column * step
            sheet.paste(
                picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2)
            )
    return sheet


def _sized(picture: Image.Image) -> Image.Image:
    """At most CELL x CELL, and small pixels large enough to be seen."""
    picture.thumbnail((CELL, CELL))
    factor = CELL // max(picture.size)
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)
