"""The order of images: whole epochs, windows of shards, groups, any cut."""

import math
from itertools import chain

import numpy as np
import pytest

from tarflow_dist.data.order import ImageOrder

SIZES = [7, 3, 11, 1, 5, 8, 2, 6]  # 43 images, a prime


def shard_of(indexes: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(SIZES)), SIZES)[indexes]


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("groups", [1, 4])
def test_an_epoch_has_each_image_once(window: int, groups: int) -> None:
    order = ImageOrder(SIZES, seed=0, window=window, groups=groups)
    for epoch in range(5):
        assert sorted(order.epoch_permutation(epoch)) == list(range(43))


@pytest.mark.parametrize("window", [1, 3])
def test_images_are_shuffled_within_windows_of_shards(window: int) -> None:
    order = ImageOrder(SIZES, seed=0, window=window)
    orders = set()
    for epoch in range(20):
        shards = shard_of(order.epoch_permutation(epoch))
        windows: list[list[int]] = []
        while len(shards):  # cut windows off the front: complete sets of `window` shards
            first = list(dict.fromkeys(shards))[:window]
            length = sum(SIZES[shard] for shard in first)
            assert set(shards[:length]) == set(first)
            windows.append(sorted(first))
            shards = shards[length:]
        assert sorted(chain(*windows)) == list(range(len(SIZES)))
        orders.add(str(windows))
    assert len(orders) == 20  # shards meet in another way every time


@pytest.mark.parametrize("groups", [2, 5, 16, 100])
def test_it_goes_round_the_groups(groups: int) -> None:
    """Each a range of indexes, and the ranges as long as each other to one image."""
    run = run_of(ImageOrder(SIZES, seed=0, window=1, groups=groups), epochs=7)
    for start in range(0, len(run), 43):
        epoch = range(start, start + 43)
        ranges = [sorted(run[p] for p in epoch if p % groups == group) for group in range(groups)]
        assert list(chain(*ranges)) == list(range(43))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(("window", "of_a_group"), [(1, 1), (3, 1), (4, 2), (6, 2)])
def test_a_group_is_shuffled_within_windows_of_its_shards(window: int, of_a_group: int) -> None:
    order = ImageOrder(SIZES, seed=0, window=window, groups=3)
    assert order.shards_at_hand == 3 * of_a_group
    orders = set()
    for epoch in range(20):
        run = order.take(np.arange(43) + 43 * epoch)[1]
        for group in range(3):
            mine = run[(np.arange(43) + 43 * epoch) % 3 == group]
            shards = shard_of(mine)
            orders.add(str(mine))
            while len(shards):
                first = list(dict.fromkeys(shards))[:of_a_group]
                length = np.isin(shards, first).sum()
                assert set(shards[:length]) == set(first)
                shards = shards[length:]
    assert len(orders) == 60


def test_one_window_shuffles_evenly() -> None:
    """In many epochs, each image stands at each place about equally often."""
    order = ImageOrder([2, 3, 1], seed=0, window=3)
    count = np.zeros((6, 6))
    for epoch in range(3000):
        count[np.arange(6), order.epoch_permutation(epoch)] += 1
    assert np.abs(count / 500 - 1).max() < 0.2


def test_it_depends_on_seed_and_epoch() -> None:
    def permutation(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(ImageOrder(SIZES, seed=seed, window=3).epoch_permutation(epoch))

    assert permutation(3, 1) == permutation(3, 1)
    pairs = [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32), (-1, 0), (10, 1), (1, 1)]
    assert len({permutation(seed, epoch) for seed, epoch in pairs}) == len(pairs)


def test_the_order_is_this_one() -> None:
    """Written down, since a run resumed by a later version must find it unchanged."""
    order = ImageOrder([3, 2, 4, 1], seed=5, window=2)
    assert order.epoch_permutation(0).tolist() == [0, 1, 9, 2, 5, 3, 6, 4, 7, 8]


def test_the_order_of_groups_is_this_one() -> None:
    order = ImageOrder([3, 2, 4, 1], seed=5, window=2, groups=3)
    assert order.epoch_permutation(0).tolist() == [2, 5, 9, 0, 6, 8, 1, 4, 7, 3]
    assert order.epoch_permutation(1).tolist() == [6, 7, 2, 5, 8, 0, 3, 9, 1, 4]


def run_of(order: ImageOrder, epochs: int) -> list[int]:
    return np.concatenate([order.epoch_permutation(epoch) for epoch in range(epochs)]).tolist()


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12, 24])
def test_ranks_share_a_batch_by_groups(groups: int, world_size: int) -> None:
    order = ImageOrder(SIZES, seed=1, window=2, groups=groups)
    for position in (0, 24, 29, 31):  # the second goes over the end of an epoch
        shares = [
            order.share(position, 24, rank=rank, world_size=world_size).tolist()
            for rank in range(world_size)
        ]
        assert sorted(chain(*shares)) == list(range(position, position + 24))
        assert {len(share) for share in shares} == {24 // world_size}
        owned = [{p % groups for p in share} for share in shares]
        for rank, have in enumerate(owned):  # from rank / world_size of the groups to the next
            first, last = (n * groups / world_size for n in (rank, rank + 1))
            assert have == set(range(int(first), math.ceil(last)))


def test_the_run_is_its_epochs_one_after_another() -> None:
    order = ImageOrder(SIZES, seed=1, window=2)
    run = run_of(order, epochs=6)
    for position, count in [(0, 43), (40, 10), (0, 6 * 43), (42, 1), (43, 1), (100, 0), (41, 130)]:
        epochs, indexes = order.take(np.arange(position, position + count))
        assert indexes.tolist() == run[position : position + count]
        assert epochs.tolist() == [p // 43 for p in range(position, position + count)]
        assert (epochs.dtype, indexes.dtype) == (np.int64, np.int64)


def test_positions_far_out_cost_nothing() -> None:
    order = ImageOrder([1000] * 1281 + [167], seed=0, window=16)
    assert len(order) == 1_281_167
    position = 300 * len(order) - 1
    epochs, indexes = order.take(np.array([position, position + 1]))
    assert epochs.tolist() == [299, 300]
    assert indexes[1] == order.epoch_permutation(300)[0]
