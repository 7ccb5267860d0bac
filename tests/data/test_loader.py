"""Batches: the same global sequence at every world size, from any position, in any format."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_dist.data.loader import Batch, eval_batches, train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards, open_shards

BATCH = 24


@pytest.fixture(scope="module", params=["mds", "wds"])
def shards(request: pytest.FixtureRequest, digits: Path) -> Shards:
    return open_shards(digits / request.param, "val")  # 297 images: not a multiple of 24


@pytest.fixture(params=[1, 4])
def order(request: pytest.FixtureRequest, shards: Shards) -> ImageOrder:
    return ImageOrder(shards.sizes, seed=0, window=2, groups=request.param)


def rank_batches(
    shards: Shards,
    order: ImageOrder | None = None,
    *,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    return train_batches(
        shards,
        order or ImageOrder(shards.sizes, seed=0, window=2),
        position=position,
        batch_size=BATCH,
        micro_batch_size=2,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
    )


def global_batches(
    shards: Shards, order: ImageOrder, count: int, *, position: int = 0, world_size: int = 1
) -> list[list[tuple[int, int]]]:
    """(epoch, index) of the images of each global batch, put together from all ranks, sorted."""
    steps = BATCH // 2 // world_size
    gathered: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for rank in range(world_size):
        batches = rank_batches(shards, order, position=position, rank=rank, world_size=world_size)
        for number, batch in enumerate(islice(batches, count * steps)):
            pairs = zip(batch.epoch.tolist(), batch.index.tolist(), strict=True)
            gathered[number // steps] += pairs
    return [sorted(batch) for batch in gathered]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batches_are_the_order_at_any_world_size(
    shards: Shards, order: ImageOrder, world_size: int
) -> None:
    for number, batch in enumerate(global_batches(shards, order, 40, world_size=world_size)):
        epochs, indexes = order.take(number * BATCH + np.arange(BATCH))
        assert batch == sorted(zip(epochs.tolist(), indexes.tolist(), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_image_comes_once_an_epoch(
    shards: Shards, order: ImageOrder, world_size: int
) -> None:
    count = 3 * 297 // BATCH + 1
    seen = list(chain(*global_batches(shards, order, count, world_size=world_size)))
    for epoch in range(3):
        assert sorted(i for e, i in seen if e == epoch) == list(range(297))


@pytest.mark.parametrize(("position", "before", "after"), [(7 * BATCH, 2, 1), (15 * BATCH, 1, 4)])
def test_a_resume_goes_on_where_it_stopped(
    shards: Shards, order: ImageOrder, position: int, before: int, after: int
) -> None:
    unbroken = global_batches(shards, order, 30, world_size=before)
    left = 30 - position // BATCH
    rest = global_batches(shards, order, left, position=position, world_size=after)
    assert rest == unbroken[position // BATCH :]


def test_a_position_need_not_be_a_multiple_of_the_batch(shards: Shards, order: ImageOrder) -> None:
    seen = set(chain(*global_batches(shards, order, 290 // BATCH + 5, position=290 % BATCH)))
    before = set(chain(*global_batches(shards, order, 290 // BATCH, position=290 % BATCH)))
    rest = set(chain(*global_batches(shards, order, 5, position=290)))
    assert len(rest) == 5 * BATCH
    assert rest == seen - before


def test_batches_hold_the_images(shards: Shards) -> None:
    batch = next(rank_batches(shards, position=290))
    assert batch.images.shape == (2, 1, 8, 8)
    assert batch.images.dtype == torch.uint8
    for image, label, index in zip(batch.images, batch.labels, batch.index.tolist(), strict=True):
        pixels, expected = shards[index]
        assert np.array_equal(image, pixels)
        assert label == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards: Shards, workers: int) -> None:
    pairs = zip(rank_batches(shards), rank_batches(shards, workers=workers), strict=False)
    for here, there in islice(pairs, 200):
        for name, tensor in vars(here).items():
            assert torch.equal(tensor, getattr(there, name))


def test_what_was_seen_is_not_read_again(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = type(shards).__getitem__

    def spy(self: Shards, index: int) -> object:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(type(shards), "__getitem__", spy)
    batch = next(rank_batches(shards, position=1000))
    assert read == batch.index.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_every_image_once_in_order(
    shards: Shards, world_size: int, workers: int
) -> None:
    for rank in range(world_size):
        batches = list(
            eval_batches(
                shards, batch_size=40, rank=rank, world_size=world_size, num_workers=workers
            )
        )
        seen = torch.cat([batch.index for batch in batches]).tolist()
        assert seen == list(range(rank, 297, world_size))
        assert all(len(batch.labels) == 40 for batch in batches[:-1])
        labels = torch.cat([batch.labels for batch in batches]).tolist()
        assert labels[5] == shards[seen[5]][1]


def test_more_ranks_than_images(digits: Path) -> None:
    shards = open_shards(digits / "wds", "val")
    assert not list(eval_batches(shards, batch_size=4, rank=300, world_size=400, num_workers=0))


TRAINER = """
import os, sys
from pathlib import Path
from tarflow_dist.data.loader import train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import open_shards

shards = open_shards(Path(sys.argv[1]), "val")
batches = train_batches(
    shards, ImageOrder(shards.sizes, seed=0, window=2), position=0, batch_size=8,
    micro_batch_size=8, rank=0, world_size=1, num_workers=2,
)
for _ in range(2):
    next(batches)  # the first of each worker: both are up
print("up", flush=True)
for line in sys.stdin:
    for _ in range(20):
        next(batches)
    print("read", flush=True)
raise RuntimeError("the trainer fails")
"""


def test_little_shared_memory_is_one_sentence(digits: Path) -> None:
    """Room for the batches, but not for the queues that bring them."""
    mount = "mount -t tmpfs -o size=60k tmpfs /dev/shm"
    if os.geteuid() or subprocess.run(["unshare", "-m", "sh", "-c", mount]).returncode:
        pytest.skip("only root may make little shared memory")
    command = [sys.executable, "-c", TRAINER, str(digits / "wds")]
    trainer = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
    )
    *_, said = trainer.stderr.splitlines()
    assert "bytes of shared memory, but /dev/shm has 61440 left: lower data.num_workers" in said
    assert "No space left" not in trainer.stderr


def test_workers_outlive_signals_but_not_the_trainer(digits: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(digits / "wds")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "up\n"
        children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
        assert len(children) == 2
        for child in map(int, children):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                os.kill(child, number)
        trainer.stdin.write("go on\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "read\n"
        trainer.stdin.close()
        trainer.wait(timeout=120)  # it hangs if workers don't heed the end
        assert trainer.stderr is not None
        assert "the trainer fails" in trainer.stderr.read()
    assert not any(Path(f"/proc/{child}").exists() for child in children)
