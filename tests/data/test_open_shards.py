"""Both formats give the same images, and what is missing or damaged is said in a sentence."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from tarflow_dist.data.shards import open_shards
from tarflow_dist.errors import UserError

FORMATS = ["mds", "wds"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_the_digits(digits: Path, form: str, split: str) -> None:
    rows = pq.read_table(digits / form / "manifest.parquet").to_pylist()
    rows = [row for row in rows if row["split"] == split]
    values, labels = load_digits(return_X_y=True)
    shards = open_shards(digits / form, split)
    assert len(shards) == sum(shards.sizes) == len(rows)
    assert len(shards.sizes) > 1
    assert (shards.num_classes, shards.image_shape) == (10, (1, 8, 8))
    for index, row in enumerate(rows):
        number = int(row["source"].removeprefix("digits/"))
        image, label = shards[index]
        assert image.dtype == np.uint8
        assert np.array_equal(image, np.round(values[number] * 255 / 16).reshape(1, 8, 8))
        assert label == labels[number]


def test_both_formats_have_the_same_shards(digits: Path) -> None:
    mds, wds = (open_shards(digits / form, "train") for form in FORMATS)
    assert mds.sizes == wds.sizes


@pytest.mark.parametrize("form", FORMATS)
def test_shards_can_be_sent_to_a_process(digits: Path, form: str) -> None:
    shards = open_shards(digits / form, "val")
    _ = shards[0]
    copy = pickle.loads(pickle.dumps(shards))
    assert np.array_equal(copy[200][0], shards[200][0])


@pytest.fixture
def copies(digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits, tmp_path / "copies")


def refused(path: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_shards(path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_folder_above_names_the_sets(digits: Path) -> None:
    assert f"did you mean {digits}/mds or {digits}/wds?" in refused(digits)


def test_wrong_paths(digits: Path, tmp_path: Path) -> None:
    assert "there are no shards at" in refused(tmp_path / "nope")
    assert "no folder of shards" in refused(tmp_path)
    assert "has no split test, only train, val" in refused(digits / "mds", "test")


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_sets(copies: Path, form: str) -> None:
    path = copies / form
    shard = sorted((path / "train").glob("*0003.*"))[0]
    with shard.open("r+b") as file:
        file.truncate(1000)
    assert f"{shard} is missing or cut short (1000 of " in refused(path)
    shard.unlink()
    assert f"{shard} is missing or cut short (0 of " in refused(path)

    index = path / {"mds": "train/index.json", "wds": "_info.json"}[form]
    index.write_text("{}")
    assert "is damaged" in refused(path)
    index.write_text('{"shards": [')
    assert f"{index} is missing or damaged" in refused(path)
    shutil.rmtree(path / "train")
    (path / "train").mkdir()
    assert "has neither MDS shards" in refused(path)
    (path / "summary.json").write_text("{}")
    assert "is damaged" in refused(path)


def test_columns_that_would_be_unpickled_are_refused(copies: Path) -> None:
    file = copies / "mds" / "train" / "index.json"
    index = json.loads(file.read_text())
    index["shards"][0]["column_encodings"][1] = "pkl"
    file.write_text(json.dumps(index))
    assert "columns of kind pkl" in refused(copies / "mds")
