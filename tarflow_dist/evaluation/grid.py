"""Samples to look at: rows of one class each, small images magnified."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tarflow_dist.evaluation.image_sets import Samples
from tarflow_dist.evaluation.store import NO_LABEL
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.pictures import GUTTER, fitted, font, strip

NAME_WIDTH = 160
LARGEST = 128  # pixels of an image's side as shown

# A class id, or None without classes, and sample indexes
Row = tuple[int | None, list[int]]


def class_rows(labels: NDArray[np.int64], rows: int, columns: int) -> list[Row]:
    """Up to `columns` samples of each of up to `rows` classes, spread over all there are, given all
    samples' labels; of an unconditional model the first samples, in as many rows as fill up."""
    classes = np.unique(labels[labels != NO_LABEL])
    if not len(classes):
        columns = min(columns, len(labels))
        rows = min(rows, len(labels) // columns)
        indexes = np.arange(rows * columns).reshape(rows, columns)
        return [(None, row) for row in indexes.tolist()]
    spread = np.linspace(0, len(classes) - 1, min(rows, len(classes))).round().astype(int)
    return [(int(c), np.flatnonzero(labels == c)[:columns].tolist()) for c in classes[spread]]


def write_grid(
    samples: Samples,
    file: Path,
    names: list[str] | None = None,
    rows: int = 20,
    columns: int = 10,
) -> None:
    """A PNG with a row for each of up to `rows` classes, under their `names` or numbers."""
    wanted = class_rows(samples.labels(), rows, columns)
    strips = [strip(samples.images(indexes), LARGEST) for _, indexes in wanted]
    left = NAME_WIDTH if any(label is not None for label, _ in wanted) else 0
    height = strips[0].height + GUTTER
    grid = Image.new("RGB", (left + max(s.width for s in strips), len(strips) * height), "white")
    draw, letters = ImageDraw.Draw(grid), font(16)
    for i, ((label, _), pictures) in enumerate(zip(wanted, strips, strict=True)):
        grid.paste(pictures, (left, i * height))
        if label is not None:
            at = (GUTTER, i * height + pictures.height // 2)
            name = fitted(class_name(label, names), letters, NAME_WIDTH - 3 * GUTTER)
            draw.text(at, name, "black", letters, anchor="lm")
    with write_whole(file) as part:
        grid.save(part, "PNG")


def class_name(label: int, names: list[str] | None) -> str:
    """What a class is called, or its number where that isn't known."""
    return names[label] if names else str(label)
