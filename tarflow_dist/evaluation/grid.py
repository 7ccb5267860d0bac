"""Samples to look at: rows of one class each, small images magnified."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow_dist.evaluation.image_sets import Samples
from tarflow_dist.evaluation.sample_store import NO_LABEL
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.pictures import picture_grid

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
    named = [class_name(label, names) for label, _ in wanted if label is not None]
    pictures = [samples.images(indexes) for _, indexes in wanted]
    with write_whole(file) as part:
        picture_grid(pictures, named, LARGEST).save(part, "PNG")


def class_name(label: int, names: list[str] | None) -> str:
    """What a class is called, or its number where that isn't known."""
    return names[label] if names else str(label)
