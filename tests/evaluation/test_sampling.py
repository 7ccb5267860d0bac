"""Filling the store: labels, resuming, any number of ranks, and errors that reach all of them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.sampling import draw_missing_chunks, make_draw, sample_labels
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
    assert draw_missing_chunks(store, draw_indexes) == 3
    assert shown(store) == list(range(10))

    before = store.chunk_file(0).stat().st_mtime_ns
    store.chunk_file(1).unlink()
    assert draw_missing_chunks(store, draw_indexes) == 1
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


def _two_ranks(rank: int, folder: Path, failing_rank: int | None) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )

    def draw(index: Tensor) -> tuple[Tensor, Tensor]:
        if rank == failing_rank:
            raise ValueError(f"sample {index[0]} is not finite")
        return draw_indexes(index)

    store = SampleStore(folder, SETTINGS)
    if failing_rank is None:
        assert draw_missing_chunks(store, draw) == 3
    else:
        with pytest.raises(UserError, match="sample 4 is not finite"):
            draw_missing_chunks(store, draw)
    dist.destroy_process_group()


def test_two_ranks_share_the_chunks(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    mp.spawn(_two_ranks, (tmp_path, None), nprocs=2)
    assert shown(store) == list(range(10))


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    mp.spawn(_two_ranks, (tmp_path, 1), nprocs=2)
    assert store.missing_chunks() == [1, 2]
