"""Which groups a run deals its set to: those that it began with."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.upload import upload
from tarflow_dist import config_file as configs
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards, open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.files import from_saved
from tarflow_dist.training.checkpoint import RunState
from tarflow_dist.training.setup import image_order

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


@pytest.fixture(scope="module")
def far(digits: Path, s3: object, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """The digits in an object store."""
    there = tmp_path_factory.mktemp("far")
    upload(shutil.copytree(digits / "mds", there / "mds"), "s3://bucket/groups/mds")
    return open_shards("s3://bucket/groups/mds", "train", cache=there / "cache")


def order_of(shards: Shards, state: RunState, *overrides: str) -> list[int]:
    config = configs.load(DIGITS, ["seed=3", "data.shuffle_window=16", *overrides])
    return image_order(config, state, shards).take(np.arange(2000))[1].tolist()


def expected(shards: Shards, groups: int) -> list[int]:
    order = ImageOrder(shards.sizes, seed=3, window=16, groups=groups)
    return order.take(np.arange(2000))[1].tolist()


@pytest.mark.parametrize(("batch_size", "groups"), [(256, 64), (96, 32), (33, 1)])
def test_a_new_run_takes_them_where_shards_are_downloaded(
    batch_size: int, groups: int, far: Shards, digits: Path
) -> None:
    state = RunState()
    assert order_of(far, state, f"train.batch_size={batch_size}") == expected(far, groups)
    assert state.groups == groups
    near = open_shards(digits / "mds", "train")
    assert order_of(near, state, f"train.batch_size={batch_size}") == expected(near, 1)
    assert state.groups == 1
    order_of(near, state, "data.groups=16")
    assert state.groups == 16


def test_a_run_goes_on_with_those_that_it_began_with(far: Shards) -> None:
    of_old = from_saved(RunState, {"images": 256, "optimizer_steps": 4})
    assert order_of(far, of_old) == order_of(far, of_old, "data.groups=1") == expected(far, 1)
    begun = RunState(images=256, groups=16)
    assert order_of(far, begun) == expected(far, 16)
    with pytest.raises(UserError, match=r"began with data.groups 16 and can't go on with 8"):
        order_of(far, begun, "data.groups=8")
    assert begun.groups == 16


def test_a_batch_that_cannot_have_as_many_of_each_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.batch_size 128 can't have .* data.groups 48: give"):
        configs.load(DIGITS, ["train.batch_size=128", "data.groups=48"])
