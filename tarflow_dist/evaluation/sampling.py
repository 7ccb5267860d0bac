"""Drawing a sample store full on any number of ranks: the same images whatever that number."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.distributed import Counter, from_main, gather, is_main
from tarflow_dist.errors import REFUSED_BY_MACHINE, UserError
from tarflow_dist.evaluation.store import NO_LABEL, SampleStore
from tarflow_dist.pretrained import TarFlow
from tarflow_dist.telemetry.progress import Progress

LOOK_EVERY_SECONDS = 0.2

# Sample indexes (B,) → uint8 images (B, H, W, C) and labels (B,), −1 for none
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Drawn:
    """What a sitting did, on all ranks."""

    chunks: int
    """Chunks it drew."""
    seconds: float
    """Ranks' seconds spent in it, added up."""
    model_seconds: float
    """Those of them that the model took."""


def sample_labels(rule: str, index: Tensor, *, num_classes: int, seed: int) -> Tensor:
    """Class ids (B,) of the samples `index` (B,).

    Args:
        rule: "random": independent and uniform over the K classes, as ADM and most of the field
            do; "balanced": i mod K, each class equally often, which gives a slightly lower FID; or
            class ids, "3,7", which take turns.
    """
    if rule == "balanced":
        return index % num_classes
    if rule == "random":
        uniform = rng.uniform((), seed=seed, purpose="sample label", index=index)
        return (uniform * num_classes).long()
    given = torch.tensor([int(label) for label in rule.split(",")])
    return given[index % len(given)]


def make_draw(flow: TarFlow, settings: dict[str, Any]) -> Draw:
    """The function from sample indexes to images that `settings` describe: "labels" is a rule of
    `sample_labels`, or None for an unconditional model; the others are `TarFlow.sample`'s own."""
    options = ("seed", "guidance", "annealed", "guide", "attn_temp", "denoise")
    chosen = {name: settings[name] for name in options}
    rule, seed = settings["labels"], settings["seed"]

    def draw(index: Tensor) -> tuple[Tensor, Tensor]:
        if rule is None:
            return flow.sample(index=index, **chosen), torch.full_like(index, NO_LABEL)
        y = sample_labels(rule, index, num_classes=flow.num_classes, seed=seed)
        return flow.sample(y, index=index, **chosen), y

    return draw


def draw_missing_chunks(
    store: SampleStore, draw: Draw, label: str = "sampling", device: str = "cpu"
) -> Drawn:
    """Draws the chunks that `store` lacks. Each rank takes the next one when it is done with its
    last, so that a slow rank holds up nobody; which rank draws a chunk changes nothing in it.

    Args:
        label: says in the progress, which is over all ranks, what is drawn.
        device: the kind of device that draws, noted with the samples.

    Raises:
        UserError: on every rank, if on one `draw` raised `ValueError` or the disk refused.
    """
    # as rank 0 sees them: ranks may see a network folder at different times, and would remember
    # for a while that a file was not there
    missing = from_main(store.missing_chunks() if is_main() else [])
    taken, drawn, failed = Counter(), Counter(), Counter()
    lacking = sum(len(store.chunk_indexes(chunk)) for chunk in missing)
    done = store.num_samples - lacking
    began, model_seconds, problem = time.monotonic(), 0.0, None
    with (
        one_thread(),
        Progress(label, store.num_samples, start=done, enabled=is_main()) as progress,
    ):
        shown = 0
        while not failed.add(0) and (place := taken.add(1) - 1) < len(missing):
            seconds, problem = _draw_chunk(store, missing[place], draw, device)
            model_seconds += seconds
            if problem is not None:
                failed.add(1)
                break
            before, shown = shown, drawn.add(len(store.chunk_indexes(missing[place])))
            progress.update(shown - before)
        while is_main() and shown < lacking and not failed.add(0):  # the others' last chunks
            time.sleep(LOOK_EVERY_SECONDS)
            before, shown = shown, drawn.add(0)
            progress.update(shown - before)
    for message in filter(None, gather(problem)):
        raise UserError(message)
    seconds = time.monotonic() - began  # with the wait for the slowest
    sums = torch.tensor(gather((seconds, model_seconds)), dtype=torch.float64).sum(dim=0)
    return Drawn(len(missing), *sums.tolist())


def _draw_chunk(
    store: SampleStore, chunk: int, draw: Draw, device: str
) -> tuple[float, str | None]:
    """Draws and writes one chunk; returns the seconds that `draw` took, and what was wrong, if
    anything.

    The last chunk is drawn at full size too and cut: another batch shape can take other kernels,
    and with them other last bits.
    """
    indexes = store.chunk_indexes(chunk)
    began = time.monotonic()
    try:
        images, labels = draw(torch.arange(indexes.start, indexes.start + store.chunk_size))
        pixels, ids = images[: len(indexes)].cpu().numpy(), labels[: len(indexes)].cpu().numpy()
        seconds = time.monotonic() - began
        store.write_chunk(chunk, pixels, ids, device)
    except ValueError as error:
        return 0.0, str(error)
    except OSError as error:
        if error.errno not in REFUSED_BY_MACHINE:
            raise
        left = len(store.missing_chunks())
        return 0.0, (
            f"{store.folder} can't take more samples ({os.strerror(error.errno)}): {left} of "
            f"{store.num_chunks} chunks are missing; make room, and run the same command again"
        )
    return seconds, None


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
