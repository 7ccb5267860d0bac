"""The nearest images: all distances written out, in one rank and in several."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tarflow_dist.evaluation.features import PixelFeatures
from tarflow_dist.evaluation.image_sets import ImageSet, Pixels
from tarflow_dist.evaluation.neighbours import NEAREST, QUERIES, Neighbours

EXTRACTOR = PixelFeatures((1, 2, 3))


class Images(ImageSet):
    """Of six pixels each."""

    def __init__(self, count: int, seed: int):
        shape = (count, 2, 3, 1)
        self.pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indexes: Sequence[int]) -> Pixels:
        return self.pixels[list(indexes)]

    def features(self) -> torch.Tensor:
        return EXTRACTOR(torch.from_numpy(self.pixels).permute(0, 3, 1, 2)).pooled


SETS, REFERENCE = [Images(10, seed=0), Images(12, seed=1)], Images(50, seed=2)


def sought() -> Neighbours:
    return Neighbours(SETS, REFERENCE, EXTRACTOR)


def expected() -> np.ndarray:
    queries = torch.cat([images.features()[:QUERIES] for images in SETS])
    apart = queries.numpy()[:, None] - REFERENCE.features().numpy()[None]
    return np.sqrt((apart**2).sum(-1))


def check(found: Neighbours) -> None:
    order = np.argsort(expected(), axis=1)[:, :NEAREST]
    assert found.indexes.tolist() == order.tolist()
    np.testing.assert_allclose(
        found.distances, np.take_along_axis(expected(), order, 1), rtol=1e-12
    )


def test_nearest_of_all_batches() -> None:
    found = sought()
    for part in torch.arange(50).split(7):
        found.add(part, REFERENCE.features()[part])
    found.reduce()
    check(found)


def test_those_of_one_set_are_shown() -> None:
    found = sought()
    found.add(torch.arange(50), REFERENCE.features())
    found.reduce()
    shown = found.of(1)
    assert [each.index for each in shown] == list(range(QUERIES))
    distances = np.sort(expected(), axis=1)[QUERIES:, :NEAREST]
    np.testing.assert_allclose([each.distances for each in shown], distances, rtol=1e-12)
    nearest = np.argsort(expected(), axis=1)[QUERIES:, :NEAREST]
    for each, row in zip(shown, nearest, strict=True):
        np.testing.assert_array_equal(each.sample, SETS[1].pixels[each.index])
        np.testing.assert_array_equal(each.images, REFERENCE.pixels[row])


def test_fewer_images_than_wanted() -> None:
    found = sought()
    found.add(torch.tensor([9, 5]), REFERENCE.features()[[9, 5]])
    found.reduce()
    assert sorted(found.indexes[0].tolist()) == [5, 9]


def test_nearest_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    for mine in (torch.arange(0, 40, 2), torch.arange(1, 50, 2), torch.arange(40, 50, 2)):
        found = sought()
        found.add(mine, REFERENCE.features()[mine])
        ranks.append(found)
    everything = [(found.distances, found.indexes) for found in ranks]
    monkeypatch.setattr("tarflow_dist.evaluation.neighbours.gather", lambda _: everything)
    for found in ranks:
        found.reduce()
        check(found)
