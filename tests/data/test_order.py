"""The order of images: whole epochs, windows of shards, any cut."""

from itertools import chain

import numpy as np
import pytest

from tarflow_dist.data.order import ImageOrder

SIZES = [7, 3, 11, 1, 5, 8, 2, 6]  # 43 images, a prime


def shard_of(indexes: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(SIZES)), SIZES)[indexes]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_an_epoch_has_each_image_once(window: int) -> None:
    order = ImageOrder(SIZES, seed=0, window=window)
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


def test_the_run_is_its_epochs_one_after_another() -> None:
    order = ImageOrder(SIZES, seed=1, window=2)
    run = np.concatenate([order.epoch_permutation(epoch) for epoch in range(6)])
    for position, count in [(0, 43), (40, 10), (0, 6 * 43), (42, 1), (43, 1), (100, 0), (41, 130)]:
        epochs, indexes = order.take(position, count)
        assert indexes.tolist() == run[position : position + count].tolist()
        assert epochs.tolist() == [p // 43 for p in range(position, position + count)]
        assert (epochs.dtype, indexes.dtype) == (np.int64, np.int64)


def test_positions_far_out_cost_nothing() -> None:
    order = ImageOrder([1000] * 1281 + [167], seed=0, window=16)
    assert len(order) == 1_281_167
    position = 300 * len(order) - 1
    epochs, indexes = order.take(position, 2)
    assert epochs.tolist() == [299, 300]
    assert indexes[1] == order.epoch_permutation(300)[0]
