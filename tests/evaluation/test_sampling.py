"""Filling the store: labels, resuming, any number of ranks, and errors that reach all of them."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.sampling import (
    draw_missing_chunks,
    make_draw,
    one_thread,
    sample_labels,
)
from tarflow_dist.evaluation.store import SampleStore
from tarflow_dist.pretrained import TarFlow

SETTINGS = {"num_samples": 10, "chunk_size": 4}


def a_store(folder: Path) -> SampleStore:
    store = SampleStore(folder, SETTINGS)
    store.begin()
    return store


def draw_indexes(index: Tensor) -> tuple[Tensor, Tensor]:
    """Images that show their own index."""
    assert len(index) == 4, "every chunk is drawn at full size"
    return index.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 1), index


def shown(store: SampleStore) -> list[int]:
    return [
        int(i) for c in range(store.num_chunks) for i in store.read_images(c).max(axis=(1, 2, 3))
    ]


def test_balanced_labels() -> None:
    labels = sample_labels("balanced", torch.arange(7), num_classes=3, seed=0)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_given_labels_take_turns() -> None:
    labels = sample_labels("3,7,3", torch.arange(2, 7), num_classes=10, seed=0)
    assert labels.tolist() == [3, 3, 7, 3, 3]


def test_random_labels_depend_on_seed_and_index_alone() -> None:
    index = torch.arange(4000)
    labels = sample_labels("random", index, num_classes=4, seed=0)
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).sub(1000).abs().max() < 150
    torch.testing.assert_close(
        sample_labels("random", index[7:9], num_classes=4, seed=0), labels[7:9]
    )
    assert (sample_labels("random", index, num_classes=4, seed=1) != labels).any()


def test_only_missing_chunks_are_drawn(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert draw_missing_chunks(store, draw_indexes).chunks == 3
    assert shown(store) == list(range(10))

    before = store.chunk_file(0).stat().st_mtime_ns
    store.chunk_file(1).unlink()
    assert draw_missing_chunks(store, draw_indexes).chunks == 1
    assert shown(store) == list(range(10))
    assert store.chunk_file(0).stat().st_mtime_ns == before


def test_a_flow_draws_the_same_image_in_any_batch() -> None:
    torch.manual_seed(0)
    flow = TarFlow(
        image_size=4, patch_size=2, in_channels=1, width=8, head_dim=8, num_blocks=2,
        layers_per_block=1, num_classes=3, sigma=0.1,
    )  # fmt: skip
    draw = make_draw(
        flow,
        {"seed": 3, "labels": "random", "guidance": 1.0, "annealed": True, "guide": "both",
         "attn_temp": 1.0, "denoise": True},
    )  # fmt: skip
    images, labels = draw(torch.arange(4))
    again, labels_again = draw(torch.arange(2, 6))
    assert images.shape == (4, 4, 4, 1)
    torch.testing.assert_close(again[:2], images[2:], rtol=0, atol=0)
    torch.testing.assert_close(labels_again[:2], labels[2:])


def _two_ranks(rank: int, folder: Path, failing: bool) -> None:
    """Rank 1 is slow, or fails at its first chunk."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mine = []

    def draw(index: Tensor) -> tuple[Tensor, Tensor]:
        if rank == 1:
            time.sleep(0.5)
            if failing:
                raise ValueError(f"sample {index[0]} is not finite")
        mine.append(int(index[0]) // 4)
        time.sleep(0.02)
        return draw_indexes(index)

    store = SampleStore(folder, SETTINGS | {"num_samples": 78})
    if failing:
        with pytest.raises(UserError, match="is not finite"):
            draw_missing_chunks(store, draw)
    else:
        drawn = draw_missing_chunks(store, draw)
        assert drawn.chunks == 20
        assert 0 < drawn.model_seconds < drawn.seconds
        shares: list[list[int]] = [[], []]
        dist.all_gather_object(shares, mine)
        assert sorted(shares[0] + shares[1]) == list(range(20))
        assert len(shares[0]) > len(shares[1]) > 0
    dist.destroy_process_group()


def test_a_slow_rank_holds_up_nobody(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SETTINGS | {"num_samples": 78})
    store.begin()
    mp.spawn(_two_ranks, (tmp_path, False), nprocs=2)
    assert shown(store) == list(range(78))


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    """Without waiting for the chunks that nobody has taken yet."""
    store = SampleStore(tmp_path, SETTINGS | {"num_samples": 4000})
    store.begin()
    mp.spawn(_two_ranks, (tmp_path, True), nprocs=2)
    assert 1 < len(store.missing_chunks()) < store.num_chunks


def test_any_number_of_threads_draws_the_same(tmp_path: Path) -> None:
    """Sums of this size are split between threads where there are several."""
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(300_000, generator=generator)

    def draw(index: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.get_num_threads() == 1
        pattern = big.sum().view(1).view(torch.uint8)
        return pattern.expand(len(index), 1, 1, 4).permute(0, 1, 3, 2).contiguous(), index

    before = torch.get_num_threads()
    digests = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            store = a_store(tmp_path / str(threads))
            draw_missing_chunks(store, draw)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        digests.append(store.sha256())
    assert digests[0] == digests[1]
    with one_thread():
        assert torch.get_num_threads() == 1


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        noise = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
        store = SampleStore(disk / "samples", SETTINGS)
        store.begin()
        with pytest.raises(UserError, match=r"No space left on device\): 1 of 3 chunks"):
            draw_missing_chunks(store, lambda index: (noise, index))
        assert sorted(file.name for file in store.folder.iterdir()) == [
            "samples-000000.parquet",
            "samples-000001.parquet",
            "settings.json",
        ]
        assert store.missing_chunks() == [2]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
