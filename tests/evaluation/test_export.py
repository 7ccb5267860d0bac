"""samples.npz as numpy reads it, and which samples the grid shows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarflow_dist.evaluation.export import grid_rows, write_grid, write_npz
from tarflow_dist.evaluation.store import SampleStore


def full_store(folder: Path, images: np.ndarray, labels: np.ndarray) -> SampleStore:
    store = SampleStore(folder, {"num_samples": len(images), "chunk_size": 4})
    store.begin()
    for chunk in range(store.num_chunks):
        rows = list(store.chunk_indexes(chunk))
        store.write_chunk(chunk, images[rows], labels[rows])
    return store


def some_images(count: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_of_a_conditional_model(tmp_path: Path, channels: int) -> None:
    images, labels = some_images(10, channels), np.arange(10) % 3
    write_npz(full_store(tmp_path, images, labels), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as npz:
        assert npz.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(npz["arr_0"], images)
        np.testing.assert_array_equal(npz["arr_1"], labels)
        assert npz["arr_1"].dtype == np.int64


def test_npz_of_an_unconditional_model_has_no_labels(tmp_path: Path) -> None:
    images = some_images(5)
    write_npz(full_store(tmp_path, images, np.full(5, -1)), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as npz:
        assert npz.files == ["arr_0"]


def test_grid_rows_are_classes() -> None:
    labels = np.array([2, 0, 2, 5, 2, 0])
    assert grid_rows(labels, side=10) == [[1, 5], [0, 2, 4], [3]]
    assert grid_rows(labels, side=2) == [[1, 5], [3]]


def test_grid_rows_without_labels_are_a_square() -> None:
    assert grid_rows(np.full(8, -1), side=10) == [[0, 1], [2, 3]]


def test_grid_shows_small_images_magnified(tmp_path: Path) -> None:
    images, labels = some_images(6, channels=1), np.array([1, 0, 1, 0, 1, 1])
    write_grid(full_store(tmp_path, images, labels), tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 68, 4 * 68)
    grid = grid.reshape(2, 68, 4, 68)[:, :64, :, :64].reshape(2 * 64, 4 * 64)
    np.testing.assert_array_equal(grid[::8, ::8][:8, :16], np.hstack(images[[1, 3], :, :, 0]))
    np.testing.assert_array_equal(grid[64::8, ::8], np.hstack(images[[0, 2, 4, 5], :, :, 0]))
