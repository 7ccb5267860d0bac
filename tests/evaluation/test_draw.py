"""Filling the store: labels, resuming, any number of ranks, and errors that reach all of them."""

import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.draw import (
    draw_missing_chunks,
    make_draw_chunk,
    one_thread,
    sample_labels,
)
from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.evaluation.sweep import SampleSettings
from tarflow_dist.flow.denoise import Denoising
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.models.redraw import Draws
from tarflow_dist.models.tarflow import TarFlow

SETTINGS = {"num_samples": 10, "chunk_size": 4}


def a_store(folder: Path) -> SampleStore:
    store = SampleStore(folder, SETTINGS)
    store.begin()
    return store


def draw_indexes(index: Tensor, places: list[int]) -> tuple[Tensor, list[Draws]]:
    """Images that show their own index, and the place of their store added to it."""
    assert len(index) == 4, "every chunk is drawn at full size"
    images = index.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 1)
    return index, [Draws(images + place, torch.zeros(4, dtype=torch.bool)) for place in places]


def chunks(drawn: list[dict[str, Any]]) -> list[int]:
    return [facts["chunks_drawn"] for facts in drawn]


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


def test_labels_in_the_mix_of_a_reference() -> None:
    counts = [10, 0, 70, 20]
    labels = sample_labels(
        "reference", torch.arange(8000), num_classes=4, seed=0, class_counts=counts
    )
    found = torch.bincount(labels, minlength=4)
    assert found[1] == 0
    assert (found / 80 - torch.tensor(counts)).abs().max() < 2
    part = sample_labels(
        "reference", torch.arange(70, 80), num_classes=4, seed=0, class_counts=counts
    )
    torch.testing.assert_close(part, labels[70:80])


def test_a_store_grows_to_what_it_would_have_been(tmp_path: Path) -> None:
    """The short last chunk is drawn again, the others stay; fewer are refused."""
    store = a_store(tmp_path)
    draw_missing_chunks([store], draw_indexes)
    first = store.chunk_file(0).stat().st_mtime_ns
    larger = SampleStore(tmp_path, SETTINGS | {"num_samples": 14})
    larger.begin()
    assert chunks(draw_missing_chunks([larger], draw_indexes)) == [2]
    assert shown(larger) == list(range(14))
    assert larger.chunk_file(0).stat().st_mtime_ns == first
    whole = SampleStore(tmp_path / "whole", SETTINGS | {"num_samples": 14})
    whole.begin()
    draw_missing_chunks([whole], draw_indexes)
    assert larger.sha256() == whole.sha256()
    with pytest.raises(UserError, match="num_samples 14, not 10"):
        a_store(tmp_path)


def test_only_missing_chunks_are_drawn(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert chunks(draw_missing_chunks([store], draw_indexes)) == [3]
    assert shown(store) == list(range(10))

    before = store.chunk_file(0).stat().st_mtime_ns
    store.chunk_file(1).unlink()
    assert chunks(draw_missing_chunks([store], draw_indexes)) == [1]
    assert shown(store) == list(range(10))
    assert store.chunk_file(0).stat().st_mtime_ns == before


def test_stores_are_filled_together_or_each_where_it_lacks_chunks(tmp_path: Path) -> None:
    stores = [a_store(tmp_path / name) for name in "ab"]
    assert chunks(draw_missing_chunks(stores, draw_indexes)) == [3, 3]
    stores[0].chunk_file(0).unlink()
    for store in stores:
        store.chunk_file(2).unlink()
    asked = []

    def draw(index: Tensor, places: list[int]) -> tuple[Tensor, list[Draws]]:
        asked.append((int(index[0]), places))
        return draw_indexes(index, places)

    assert chunks(draw_missing_chunks(stores, draw)) == [2, 1]
    assert asked == [(0, [0]), (8, [0, 1])]
    assert [shown(store) for store in stores] == [list(range(10)), list(range(1, 11))]


def a_flow() -> TarFlow:
    torch.manual_seed(0)
    flow = TarFlow(
        image_size=4, patch_size=2, in_channels=1, width=8, head_dim=8, num_blocks=2,
        layers_per_block=1, num_classes=3, sigma=0.1,
    )  # fmt: skip
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    return flow.requires_grad_(False)


def flow_settings(denoise: bool) -> SampleSettings:
    return SampleSettings(
        weights_sha256="",
        config_sha256="",
        dtype="float32",
        num_samples=70,
        chunk_size=4,
        seed=3,
        labels="random",
        uint8_rule="",
        sampler="",
        guidance=Guidance(1.0, annealed=True, rule="gaussian", blocks=[1]),
        denoising=Denoising() if denoise else None,
    )


def test_a_flow_draws_the_same_image_in_any_batch() -> None:
    draw = make_draw_chunk(a_flow(), [flow_settings(True)])
    labels, (drawn,) = draw(torch.arange(4), [0])
    labels_again, (again,) = draw(torch.arange(2, 6), [0])
    assert drawn.images.shape == (4, 4, 4, 1)
    torch.testing.assert_close(again.images[:2], drawn.images[2:], rtol=0, atol=0)
    torch.testing.assert_close(labels_again[:2], labels[2:])


def test_with_and_without_the_score_step_from_one_decoding() -> None:
    flow = a_flow()
    draw = make_draw_chunk(flow, [flow_settings(denoise) for denoise in (False, True)])
    apart = [draw(torch.arange(4), [place])[1][0].images for place in (0, 1)]
    decode, calls = flow.decode, []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments)
        return decode(*arguments, **options)

    flow.decode = counted  # type: ignore[method-assign]
    labels, together = draw(torch.arange(4), [0, 1])
    assert len(calls) == 1
    assert not torch.equal(*apart)
    for images, drawn in zip(apart, together, strict=True):
        torch.testing.assert_close(drawn.images, images, rtol=0, atol=0)
    flow.decode = decode  # type: ignore[method-assign]
    y = sample_labels("random", torch.arange(4), num_classes=3, seed=3)
    assert labels.tolist() == y.tolist()
    noise = flow.noise_of(torch.arange(4), seed=3)
    x = flow.decode(noise, y, guidance=1.0, annealed=True, rule="gaussian", guide_blocks=[1])
    written_out = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(together[0].images, written_out)


def runs_away(noise: Tensor) -> Tensor:
    """Which latents (B, N, D) `draw_unstably`'s model makes no picture of."""
    return noise[:, 0, 0] > 0.8


def draw_unstably(folder: Path) -> None:
    """On each rank: a model that some noise sends away."""
    distributed.init()
    flow = a_flow()
    decode = flow.decode

    def unstable(z: Tensor, *arguments: Any, **options: Any) -> Tensor:
        lost = runs_away(z)[:, None, None, None]
        return decode(z, *arguments, **options).masked_fill(lost, torch.nan)

    flow.decode = unstable  # type: ignore[method-assign]
    settings = [flow_settings(denoise) for denoise in (False, True)]
    stores = [SampleStore(folder / str(i), s.to_json()) for i, s in enumerate(settings)]
    draw_missing_chunks(stores, make_draw_chunk(flow, settings))
    distributed.shutdown()


def test_samples_drawn_again_are_counted_on_any_ranks_and_after_a_resume(tmp_path: Path) -> None:
    """Each once, however often it was drawn; those that the last chunk leaves out not at all."""
    lost = runs_away(a_flow().noise_of(torch.arange(72), seed=3))
    twice = lost & runs_away(a_flow().noise_of(torch.arange(72), seed=3, attempt=1))
    assert twice[:70].any()
    assert lost[70:].any()
    digests = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        settings = [flow_settings(denoise) for denoise in (False, True)]
        stores = [SampleStore(folder / str(i), s.to_json()) for i, s in enumerate(settings)]
        for store in stores:
            store.begin()
        ranks.run(draw_unstably, folder, ranks=count)
        assert [store.redrawn() for store in stores] == [int(lost[:70].sum())] * 2
        stores[0].chunk_file(17).unlink()
        stores[1].chunk_file(3).unlink()
        ranks.run(draw_unstably, folder, ranks=4 - count)
        assert [store.redrawn() for store in stores] == [int(lost[:70].sum())] * 2
        digests.append([store.sha256() for store in stores])
    assert digests[0] == digests[1]


FAILURES = [
    (ValueError("sample 4 is not finite"), "sample 4 is not finite"),
    (torch.OutOfMemoryError("2.00 GiB"), "4 samples at once don't fit into the device's memory"),
]


def _two_ranks(folder: Path, failure: int | None) -> None:
    """Rank 1 is slow, or fails at its first chunk."""
    distributed.init()
    mine = []

    def draw(index: Tensor, places: list[int]) -> tuple[Tensor, list[Draws]]:
        if distributed.rank() == 1:
            time.sleep(0.5)
            if failure is not None:
                raise FAILURES[failure][0]
        mine.append(int(index[0]) // 4)
        time.sleep(0.02)
        return draw_indexes(index, places)

    store = SampleStore(folder, SETTINGS | {"num_samples": 78})
    if failure is not None:
        with pytest.raises(UserError, match=FAILURES[failure][1]):
            draw_missing_chunks([store], draw)
    else:
        drawn = draw_missing_chunks([store], draw)
        assert chunks(drawn) == [20]
        assert 0 < drawn[0]["sampling_overhead"] < 1
        shares = distributed.gather(mine)
        assert sorted(shares[0] + shares[1]) == list(range(20))
        assert len(shares[0]) > len(shares[1]) > 0
    distributed.shutdown()


def test_a_slow_rank_holds_up_nobody(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SETTINGS | {"num_samples": 78})
    store.begin()
    ranks.run(_two_ranks, tmp_path, None, ranks=2)
    assert shown(store) == list(range(78))


@pytest.mark.parametrize("failure", range(len(FAILURES)))
def test_an_error_on_one_rank_ends_all(failure: int, tmp_path: Path) -> None:
    """Without waiting for the chunks that nobody has taken yet."""
    store = SampleStore(tmp_path, SETTINGS | {"num_samples": 4000})
    store.begin()
    ranks.run(_two_ranks, tmp_path, failure, ranks=2)
    assert 1 < len(store.missing_chunks()) < store.num_chunks


def test_any_number_of_threads_draws_the_same(tmp_path: Path) -> None:
    """Sums of this size are split between threads where there are several."""
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(300_000, generator=generator)

    def draw(index: Tensor, places: list[int]) -> tuple[Tensor, list[Draws]]:
        assert torch.get_num_threads() == 1
        pattern = big.sum().view(1).view(torch.uint8)
        images = pattern.expand(len(index), 1, 1, 4).permute(0, 1, 3, 2).contiguous()
        return index, [Draws(images, torch.zeros(len(index), dtype=torch.bool))]

    before = torch.get_num_threads()
    digests = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            store = a_store(tmp_path / str(threads))
            draw_missing_chunks([store], draw)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        digests.append(store.sha256())
    assert digests[0] == digests[1]
    with one_thread():
        assert torch.get_num_threads() == 1


def test_a_full_disk(small_disk: Path) -> None:
    noise = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    store = SampleStore(small_disk / "samples", SETTINGS)
    store.begin()
    with pytest.raises(UserError, match=r"No space left on device\): 1 of 3 chunks"):
        draw_missing_chunks([store], lambda index, places: (index, [Draws(noise, index < 0)]))
    assert sorted(file.name for file in store.folder.iterdir()) == [
        "samples-000000.parquet",
        "samples-000001.parquet",
        "settings.json",
    ]
    assert store.missing_chunks() == [2]
