"""The samples in other forms, read as others read them, and the grid."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torch_fidelity.datasets import ImagesPathDataset

from tarflow_dist.evaluation.export import WRITERS, write_folder, write_npz, write_tars
from tarflow_dist.evaluation.report import class_rows, write_grid
from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.telemetry.pictures import NAME_WIDTH, strip


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
    write_npz(full_store(tmp_path, images, labels))
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as npz:
        assert npz.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(npz["arr_0"], images.repeat(3 // channels, axis=3))
        np.testing.assert_array_equal(npz["arr_1"], labels)
        assert npz["arr_1"].dtype == np.int64


def test_npz_of_an_unconditional_model_has_no_labels(tmp_path: Path) -> None:
    images = some_images(5)
    write_npz(full_store(tmp_path, images, np.full(5, -1)))
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as npz:
        assert npz.files == ["arr_0"]


def test_npz_as_adms_evaluator_streams_it(tmp_path: Path) -> None:
    """It opens arr_0.npy in the zip, reads a header of version 1.0 and then the rows."""
    images = some_images(10)
    write_npz(full_store(tmp_path, images, np.arange(10)))
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == ((10, 8, 8, 3), False, np.uint8)
        first = np.frombuffer(file.read(4 * 8 * 8 * 3), dtype).reshape(4, 8, 8, 3)
    np.testing.assert_array_equal(first, images[:4])


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_as_torch_fidelity_reads_it(tmp_path: Path, channels: int) -> None:
    images = some_images(10, channels)
    write_folder(full_store(tmp_path, images, np.arange(10)))
    files = sorted(str(file) for file in (tmp_path / "png").iterdir())
    dataset = ImagesPathDataset(files)
    assert len(dataset) == 10
    for index in range(10):
        expected = images[index].transpose(2, 0, 1).repeat(3 // channels, axis=0)
        np.testing.assert_array_equal(np.asarray(dataset[index]), expected)


@pytest.mark.parametrize("labelled", [True, False])
def test_tars_as_webdataset_reads_them(
    tmp_path: Path, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tarflow_dist.evaluation.export.IMAGES_A_TAR", 6)
    images = some_images(10)
    write_tars(full_store(tmp_path, images, np.arange(10) if labelled else np.full(10, -1)))
    tars = sorted(str(file) for file in (tmp_path / "wds").iterdir())
    assert [Path(file).name for file in tars] == ["samples-000000.tar", "samples-000001.tar"]
    dataset = webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(10)]
    np.testing.assert_array_equal([sample["png"] for sample in samples], images)
    assert [sample.get("cls") for sample in samples] == (
        list(range(10)) if labelled else [None] * 10
    )
    with tarfile.open(tars[1]) as tar:
        assert {member.mtime for member in tar} == {0}


def test_writing_again_replaces(tmp_path: Path) -> None:
    store = full_store(tmp_path, some_images(6), np.arange(6))
    for write in WRITERS.values():
        write(store)
        write(store)
    hidden = [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert hidden == []


def test_rows_are_classes() -> None:
    labels = np.array([2, 0, 2, 5, 2, 0])
    assert class_rows(labels, rows=10, columns=10) == [(0, [1, 5]), (2, [0, 2, 4]), (5, [3])]
    assert class_rows(labels, rows=2, columns=2) == [(0, [1, 5]), (5, [3])]


def test_rows_without_labels_fill_up() -> None:
    assert class_rows(np.full(8, -1), rows=2, columns=3) == [(None, [0, 1, 2]), (None, [3, 4, 5])]
    assert class_rows(np.full(2, -1), rows=2, columns=3) == [(None, [0, 1])]


def test_large_images_are_shown_smaller() -> None:
    assert strip(np.zeros((3, 256, 256, 3), np.uint8), 128).size == (3 * 132, 128)
    assert strip(np.zeros((2, 200, 200, 1), np.uint8), 128).size == (2 * 132, 128)
    assert strip(np.zeros((2, 96, 96, 1), np.uint8), 128).size == (2 * 100, 96)


def test_grid_shows_small_images_magnified_under_their_names(tmp_path: Path) -> None:
    images, labels = some_images(6, channels=1), np.array([1, 0, 1, 0, 1, 1])
    write_grid(full_store(tmp_path, images, labels), tmp_path / "grid.png", ["ant, emmet", "bee"])
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    names, grid = grid[:, :NAME_WIDTH], grid[:, NAME_WIDTH:]
    assert (names[:64] < 128).any()
    assert (names[68:132] < 128).any()
    assert grid.shape == (2 * 68, 4 * 68)
    grid = grid.reshape(2, 68, 4, 68)[:, :64, :, :64].reshape(2 * 64, 4 * 64)
    np.testing.assert_array_equal(grid[::8, ::8][:8, :16], np.hstack(images[[1, 3], :, :, 0]))
    np.testing.assert_array_equal(grid[64::8, ::8], np.hstack(images[[0, 2, 4, 5], :, :, 0]))
