"""A finished sample store as the field wants it: ADM's samples.npz, and a picture to look at."""

import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow_dist.evaluation.store import NO_LABEL, Pixels, SampleStore
from tarflow_dist.files import write_whole

GUTTER = 4  # white pixels between the images of a grid


def write_npz(store: SampleStore, file: Path) -> None:
    """ADM's sample file: arr_0 uint8 (num_samples, H, W, C) and, of a conditional model, arr_1
    int64 labels (num_samples,). ADM's evaluator wants colour; grey samples stay as the model drew
    them, C = 1. Holds one chunk in memory at a time."""
    labels = np.concatenate([store.read_labels(chunk) for chunk in range(store.num_chunks)])
    first = store.read_images(0, rows=[0])
    shape = (store.num_samples, *first.shape[1:])
    chunks = (store.read_images(chunk) for chunk in range(store.num_chunks))
    with write_whole(file) as part, zipfile.ZipFile(part, "w") as archive:
        _write_array(archive, "arr_0", shape, first.dtype, chunks)
        if (labels != NO_LABEL).any():
            _write_array(archive, "arr_1", labels.shape, labels.dtype, [labels])


def _write_array(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    pieces: Iterable[NDArray],
) -> None:
    """Writes `pieces`, which make up an array of `shape` along the first axis, as `name`.npy."""
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    # ZipInfo has a fixed date: the same samples are the same file
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(np.ascontiguousarray(piece).data)


def write_grid(store: SampleStore, file: Path, side: int = 10) -> None:
    """A PNG of samples: a row for each of up to `side` classes spread over all there are, or the
    first `side`² of an unconditional model. Images below 64 pixels are magnified."""
    from PIL import Image

    labels = np.concatenate([store.read_labels(chunk) for chunk in range(store.num_chunks)])
    rows = [_read_at(store, row) for row in grid_rows(labels, side)]
    H, W, C = rows[0].shape[1:]
    scale = max(1, 64 // H)
    height, width = H * scale + GUTTER, W * scale + GUTTER
    columns = max(len(row) for row in rows)
    grid = np.full((len(rows) * height, columns * width, C), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            large = image.repeat(scale, axis=0).repeat(scale, axis=1)
            top, left = i * height, j * width
            grid[top : top + H * scale, left : left + W * scale] = large
    with write_whole(file) as part:
        Image.fromarray(grid.squeeze(2) if C == 1 else grid).save(part, "PNG")


def grid_rows(labels: NDArray[np.int64], side: int) -> list[list[int]]:
    """The sample indexes of each row of the grid, given all samples' labels."""
    classes = np.unique(labels[labels != NO_LABEL])
    if not len(classes):
        side = min(side, int(len(labels) ** 0.5))
        return np.arange(side * side).reshape(side, side).tolist()
    spread = np.linspace(0, len(classes) - 1, min(side, len(classes))).round().astype(int)
    return [np.flatnonzero(labels == label)[:side].tolist() for label in classes[spread]]


def _read_at(store: SampleStore, indexes: list[int]) -> Pixels:
    """The images (len(indexes), H, W, C) of the ascending sample indexes."""
    rows_of: dict[int, list[int]] = defaultdict(list)
    for index in indexes:
        rows_of[index // store.chunk_size].append(index % store.chunk_size)
    return np.concatenate([store.read_images(chunk, rows) for chunk, rows in rows_of.items()])
