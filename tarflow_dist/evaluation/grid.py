"""Samples to look at: rows of one class each, small images magnified."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tarflow_dist.evaluation.store import NO_LABEL, Pixels, SampleStore
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.pictures import GUTTER, font, strip

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
    store: SampleStore,
    file: Path,
    names: list[str] | None = None,
    rows: int = 20,
    columns: int = 10,
) -> None:
    """A PNG with a row for each of up to `rows` classes, under their `names` or numbers."""
    wanted = class_rows(store.labels(), rows, columns)
    strips = [strip(read_at(store, indexes), LARGEST) for _, indexes in wanted]
    left = NAME_WIDTH if any(label is not None for label, _ in wanted) else 0
    height = strips[0].height + GUTTER
    grid = Image.new("RGB", (left + max(s.width for s in strips), len(strips) * height), "white")
    draw, letters = ImageDraw.Draw(grid), font(16)
    for i, ((label, _), pictures) in enumerate(zip(wanted, strips, strict=True)):
        grid.paste(pictures, (left, i * height))
        if label is not None:
            at = (GUTTER, i * height + pictures.height // 2)
            name = class_name(label, names)
            while draw.textlength(name, letters) > NAME_WIDTH - 3 * GUTTER:
                name = name.removesuffix("…")[:-1] + "…"
            draw.text(at, name, "black", letters, anchor="lm")
    with write_whole(file) as part:
        grid.save(part, "PNG")


def class_name(label: int, names: list[str] | None) -> str:
    """A class's name, or its number where there are none."""
    return names[label] if names else str(label)


def read_at(store: SampleStore, indexes: list[int]) -> Pixels:
    """The images (len(indexes), H, W, C) of the ascending sample indexes."""
    rows_of: dict[int, list[int]] = defaultdict(list)
    for index in indexes:
        rows_of[index // store.chunk_size].append(index % store.chunk_size)
    return np.concatenate([store.read_images(chunk, rows) for chunk, rows in rows_of.items()])
