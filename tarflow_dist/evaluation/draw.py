"""The first stage of `sample_fid`: filling sample stores on any number of ranks, with the same
images whatever that number."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.distributed import Counter, device_name, from_main, gather, is_main
from tarflow_dist.errors import REFUSED_BY_MACHINE, UserError, enough_memory
from tarflow_dist.evaluation.image_sets import NO_LABEL
from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.evaluation.sweep import SampleSettings
from tarflow_dist.models.redraw import Draws
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.telemetry.progress import Progress

LOOK_EVERY_SECONDS = 0.2

# A chunk's sample indexes (B,) and the places of the stores to draw for → labels (B,), −1 for none,
# and what each of those stores takes
DrawChunk = Callable[[Tensor, list[int]], tuple[Tensor, list[Draws]]]


def draw(
    flow: TarFlow, settings: dict[str, SampleSettings], out: Path, device: torch.device
) -> dict[str, SampleStore]:
    """Draws what is missing of each point, by its name, into its store below `out`."""
    stores = {name: SampleStore(out / name, chosen.to_json()) for name, chosen in settings.items()}
    if is_main():
        for store in stores.values():
            store.begin()
        for sampler in dict.fromkeys(chosen.sampler for chosen in settings.values()):
            print(f"sampler: {sampler}", flush=True)
    # points that differ in the denoising alone share the decoding, and each has the others' time
    for _, alike in groupby(settings, lambda name: settings[name].guidance):
        names = list(alike)
        drawn = draw_missing_chunks(
            [stores[name] for name in names],
            make_draw_chunk(flow, [settings[name] for name in names]),
            f"sampling {', '.join(names)}".strip(),
            device_name(device),
        )
        for name, sitting in zip(names, drawn, strict=True):
            store = stores[name]
            store.about = {
                **store.settings,
                "sample_devices": store.devices(),
                "redrawn_samples": store.redrawn(),
                **sitting,
            }
    return stores


def make_draw_chunk(flow: TarFlow, settings: Sequence[SampleSettings]) -> DrawChunk:
    """Draws for stores of these `settings`, which differ in the denoising alone."""
    ways = [point.denoising for point in settings]
    common = settings[0]

    def draw_chunk(index: Tensor, places: list[int]) -> tuple[Tensor, list[Draws]]:
        y = None
        if common.labels is not None:
            y = sample_labels(
                common.labels,
                index,
                num_classes=flow.num_classes,
                seed=common.seed,
                class_counts=common.class_counts,
            )
        drawn = flow.draw(
            y,
            [ways[place] for place in places],
            seed=common.seed,
            index=index,
            **common.guidance.arguments(),
        )
        return torch.full_like(index, NO_LABEL) if y is None else y, drawn

    return draw_chunk


def draw_missing_chunks(
    stores: Sequence[SampleStore],
    draw_chunk: DrawChunk,
    label: str = "sampling",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Draws the chunks that `stores` lack, those of one number together. Each rank takes the next
    one when it is done with its last, so that a slow rank holds up nobody; which rank draws a chunk
    changes nothing in it. One chunk is written while the next is drawn.

    Args:
        stores: of as many samples and chunks each.
        label: says in the progress, which is over all ranks, what is drawn.
        device: the kind of device that draws, noted with the samples.

    Returns:
        What a result says of this sitting, for each store. "sampling_overhead" is the share of the
        ranks' time that the model did not have: waiting for the last chunk to be written, and for
        the slowest rank.

    Raises:
        UserError: on every rank, if on one `draw_chunk` raised `ValueError`, or its device's
            memory or the disk was full.
    """
    # as rank 0 sees them: ranks may see a network folder at different times, and would remember
    # for a while that a file was not there
    missing = from_main(_missing_chunks(stores) if is_main() else [])
    taken, drawn, failed = Counter(), Counter(), Counter()
    lacking = sum(len(stores[0].chunk_indexes(c)) * len(places) for c, places in missing)
    total, size = stores[0].num_samples * len(stores), stores[0].chunk_size
    began, model_seconds, problem = time.monotonic(), 0.0, None

    with (
        one_thread(),
        ThreadPoolExecutor(1) as thread,
        Progress(label, total, start=total - lacking, enabled=is_main()) as progress,
    ):
        shown, writing = 0, None

        def show(count: int) -> None:
            nonlocal shown
            before, shown = shown, drawn.add(count)
            progress.update(shown - before)

        try:
            while not failed.add(0) and (turn := taken.add(1) - 1) < len(missing):
                chunk, places = missing[turn]
                before = time.monotonic()
                # the last chunk too is drawn at full size, and then cut: another batch shape can
                # take other kernels, and with them other last bits
                index = torch.arange(chunk * size, (chunk + 1) * size)
                with enough_memory(
                    f"{size} samples at once",
                    "lower --batch-size, with another --out if samples are there",
                ):
                    labels, found = draw_chunk(index, places)
                arrays = [Draws(draws.images.cpu(), draws.again.cpu()) for draws in found]
                model_seconds += time.monotonic() - before
                if writing is not None:
                    show(writing.result())
                there = [stores[place] for place in places]
                writing = thread.submit(_write_chunk, there, chunk, labels, arrays, device)
            if writing is not None:
                show(writing.result())
        except (ValueError, OSError) as error:
            problem = _in_words(error, stores)
            failed.add(1)
        while is_main() and shown < lacking and not failed.add(0):  # the others' last chunks
            time.sleep(LOOK_EVERY_SECONDS)
            show(0)
    for message in filter(None, gather(problem)):
        raise UserError(message)
    seconds = time.monotonic() - began  # with the wait for the slowest
    whole, of_model = torch.tensor(gather((seconds, model_seconds)), dtype=torch.float64).sum(dim=0)
    overhead = round(float(1 - of_model / whole), 4) if missing else None
    return [
        {
            "chunks_drawn": sum(place in places for _, places in missing),
            "sampling_overhead": overhead,
            "seconds": {"sampling": round(seconds, 3)},
        }
        for place in range(len(stores))
    ]


def _missing_chunks(stores: Sequence[SampleStore]) -> list[tuple[int, list[int]]]:
    """Each chunk that is missing somewhere, and the places of the stores that lack it."""
    lacking: dict[int, list[int]] = defaultdict(list)
    for place, store in enumerate(stores):
        for chunk in store.missing_chunks():
            lacking[chunk].append(place)
    return sorted(lacking.items())


def _write_chunk(
    stores: list[SampleStore], chunk: int, labels: Tensor, drawn: list[Draws], device: str
) -> int:
    """Returns the number of samples written."""
    count = len(stores[0].chunk_indexes(chunk))
    for store, draws in zip(stores, drawn, strict=True):
        store.write_chunk(
            chunk,
            draws.images[:count].numpy(),
            labels[:count].numpy(),
            redrawn=int(draws.again[:count].sum()),
            device=device,
        )
    return count * len(stores)


def _in_words(error: ValueError | OSError, stores: Sequence[SampleStore]) -> str:
    """What to tell the user; raises the error again if it is none of the user's."""
    if isinstance(error, ValueError):
        return f"{stores[0].folder}: {error}"
    if error.errno not in REFUSED_BY_MACHINE:
        raise error
    left = sum(len(store.missing_chunks()) for store in stores)
    return (
        f"{stores[0].folder} can't take more samples ({os.strerror(error.errno)}): {left} of "
        f"{sum(store.num_chunks for store in stores)} chunks are missing; make room, and run the "
        "same command again"
    )


def sample_labels(
    rule: str,
    index: Tensor,
    *,
    num_classes: int,
    seed: int,
    class_counts: Sequence[int] | None = None,
) -> Tensor:
    """Class ids (B,) of the samples `index` (B,).

    Args:
        rule: "random": independent and uniform over the K classes, as ADM and most of the field
            do; "balanced": i mod K, each class equally often, which gives a slightly lower FID;
            "reference": independent, each class as likely as its share of `class_counts`; or class
            ids, "3,7", which take turns.
    """
    if rule == "balanced":
        return index % num_classes
    if rule in ("random", "reference"):
        uniform = rng.uniform((), seed=seed, purpose="sample label", index=index)
        if rule == "random":
            return (uniform * num_classes).long()
        ends = torch.tensor(class_counts, dtype=torch.float64).cumsum(dim=0)
        return torch.searchsorted(ends, uniform.double() * ends[-1], right=True)
    given = torch.tensor([int(label) for label in rule.split(",")])
    return given[index % len(given)]


@contextmanager
def one_thread() -> Iterator[None]:
    """On a CPU, threads share a sum, and their number decides on its last bits: torchrun gives its
    ranks one, a process alone takes all cores. So all draw with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
