"""The nearest images: all distances written out, in one rank and in several."""

import numpy as np
import pytest
import torch

from tarflow_dist.evaluation.neighbours import Neighbours


def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, generator=generator), torch.randn(50, 6, generator=generator)


def expected() -> np.ndarray:
    queries, images = (x.double().numpy() for x in sets())
    return np.sqrt(((queries[:, None] - images[None]) ** 2).sum(-1))


def check(found: Neighbours) -> None:
    order = np.argsort(expected(), axis=1)[:, :4]
    assert found.indexes.tolist() == order.tolist()
    np.testing.assert_allclose(
        found.distances, np.take_along_axis(expected(), order, 1), rtol=1e-12
    )


def test_nearest_of_all_batches() -> None:
    queries, images = sets()
    found = Neighbours(queries, 4)
    for part in torch.arange(50).split(7):
        found.add(part, images[part])
    found.reduce()
    check(found)


def test_fewer_images_than_wanted() -> None:
    queries, images = sets()
    found = Neighbours(queries, 4)
    found.add(torch.tensor([9, 5]), images[[9, 5]])
    found.reduce()
    assert sorted(found.indexes[0].tolist()) == [5, 9]


def test_nearest_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, images = sets()
    ranks = []
    for mine in (torch.arange(0, 40, 2), torch.arange(1, 50, 2), torch.arange(40, 50, 2)):
        found = Neighbours(queries, 4)
        found.add(mine, images[mine])
        ranks.append(found)
    everything = [(found.distances, found.indexes) for found in ranks]
    monkeypatch.setattr("tarflow_dist.evaluation.neighbours.gather", lambda _: everything)
    for found in ranks:
        found.reduce()
        check(found)
