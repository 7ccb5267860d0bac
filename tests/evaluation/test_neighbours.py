"""The nearest images: all distances written out, in one rank and in two."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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


def _two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    queries, images = sets()
    found = Neighbours(queries, 4)
    mine = torch.arange(rank, 50, 2)
    found.add(mine, images[mine])
    found.reduce()
    check(found)
    dist.destroy_process_group()


def test_nearest_over_two_ranks(tmp_path: Path) -> None:
    mp.spawn(_two_ranks, (tmp_path,), nprocs=2)
