"""Damaged shards: what is read is what was written, or a sentence says which image is not."""

import random
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from damage import KINDS, damage_shards

from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Digits
from tarflow_dist.data.loader import eval_batches, train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards, open_shards
from tarflow_dist.errors import UserError


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in more than a hundred shards to train on."""
    out = tmp_path_factory.mktemp("many")
    prepare(Digits(seed=0), out, ["mds", "wds"], Settings(size=8, shard_bytes=1200))
    return out


@pytest.mark.parametrize("form", ["mds", "wds"])
def test_damage_while_reading_never_gives_another_image(
    many: Path, form: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(many / form, tmp_path / form)
    shards = open_shards(folder, "train")
    expected = [shards[index] for index in range(len(shards))]
    damaged = damage_shards(folder, count=100, seed=0)  # under the eyes of `shards`
    assert set(damaged.values()) == set(KINDS)
    said = set()
    for index, (image, label) in enumerate(expected):
        try:
            pixels, number = shards[index]
        except UserError as error:
            said.add(name_in(str(error), folder, index))
        else:
            assert np.array_equal(pixels, image)
            assert number == label
    assert said <= set(damaged)
    # a bit may flip between the images, where only `verify` looks
    assert {name for name, kind in damaged.items() if kind != "flipped"} <= said


def name_in(sentence: str, folder: Path, index: int) -> str:
    """The shard that the sentence on an image names."""
    where = f"image {index} of train, in {folder}/"
    assert sentence.startswith(where)
    return sentence.removeprefix(where).partition(",")[0]


def first_error(folder: Path, shards: Shards, workers: int) -> str:
    batches = train_batches(
        shards,
        ImageOrder(shards.sizes, seed=0, window=4),
        position=0,
        batch_size=10,
        micro_batch_size=5,
        rank=0,
        world_size=1,
        num_workers=workers,
    )
    try:  # pytest.raises would keep the loader alive
        list(islice(batches, 2 * len(shards)))
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was wrong")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["mds", "wds"])
def test_the_trainer_gets_one_sentence(many: Path, form: str, workers: int, tmp_path: Path) -> None:
    folder = shutil.copytree(many / form, tmp_path / form)
    shards = open_shards(folder, "train")
    name = random.Random(form).choice(sorted(damage_shards(folder, count=1, seed=3)))
    said = first_error(folder, shards, workers)
    assert said.startswith("image ")
    assert f" of train, in {folder}/{name}, is damaged: " in said
    assert "\n" not in said
    (folder / name).unlink()
    said = first_error(folder, shards, workers)
    assert f"{folder}/{name}, can't be read (No such file or directory): " in said


def test_evaluation_gets_one_sentence(many: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(many / "mds", tmp_path / "mds")
    shards = open_shards(folder, "val")
    file = folder / "val" / "shard.00003.mds"
    file.write_bytes(bytes(file.stat().st_size))
    batches = eval_batches(shards, batch_size=8, rank=0, world_size=1, num_workers=1)
    with pytest.raises(UserError, match=r"val/shard\.00003\.mds, is damaged"):
        list(batches)
