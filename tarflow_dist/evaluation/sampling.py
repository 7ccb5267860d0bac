"""Drawing a sample store full on any number of ranks: the same images whatever that number."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tarflow_dist import rng
from tarflow_dist.distributed import from_main, gather, is_main, rank, world_size
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.store import NO_LABEL, SampleStore
from tarflow_dist.pretrained import TarFlow
from tarflow_dist.telemetry.progress import Progress

# Sample indexes (B,) → uint8 images (B, H, W, C) and labels (B,), −1 for none
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


def sample_labels(rule: str, index: Tensor, *, num_classes: int, seed: int) -> Tensor:
    """Class ids (B,) of the samples `index` (B,): independent and uniform over the K classes
    ("random", as ADM and most of the field do), or i mod K ("balanced": each class equally often,
    which gives a slightly lower FID)."""
    if rule == "balanced":
        return index % num_classes
    uniform = rng.uniform((), seed=seed, purpose="sample label", index=index)
    return (uniform * num_classes).long()


def make_draw(flow: TarFlow, settings: dict[str, Any]) -> Draw:
    """The function from sample indexes to images that `settings` describe: "labels" is a rule of
    `sample_labels` or None for an unconditional model, the others are `TarFlow.sample`'s own."""
    options = ("seed", "guidance", "annealed", "guide", "attn_temp", "denoise")
    chosen = {name: settings[name] for name in options}
    rule, seed = settings["labels"], settings["seed"]

    def draw(index: Tensor) -> tuple[Tensor, Tensor]:
        if rule is None:
            return flow.sample(index=index, **chosen), torch.full_like(index, NO_LABEL)
        y = sample_labels(rule, index, num_classes=flow.num_classes, seed=seed)
        return flow.sample(y, index=index, **chosen), y

    return draw


def draw_missing_chunks(store: SampleStore, draw: Draw) -> int:
    """Draws the chunks that `store` lacks, one a rank at a time; returns how many.

    After each round the ranks tell one another how they fared, so that progress is that of all, an
    error on one ends all, and none waits longer than a chunk takes.

    Raises:
        UserError: on every rank, if `draw` raised `ValueError` on one.
    """
    # as rank 0 sees them: ranks may see a network folder at different times
    missing = from_main(store.missing_chunks())
    lacking = sum(len(store.chunk_indexes(chunk)) for chunk in missing)
    done = store.num_samples - lacking
    with Progress("sampling", store.num_samples, start=done, enabled=is_main()) as progress:
        for start in range(0, len(missing), world_size()):
            chunks = missing[start : start + world_size()]
            error = _draw_chunk(store, chunks[rank()], draw) if rank() < len(chunks) else None
            for message in filter(None, gather(error)):
                raise UserError(message)
            progress.update(sum(len(store.chunk_indexes(chunk)) for chunk in chunks))
    return len(missing)


def _draw_chunk(store: SampleStore, chunk: int, draw: Draw) -> str | None:
    """Draws and writes one chunk; returns what was wrong, if anything.

    The last chunk is drawn at full size too and cut: another batch shape can take other kernels,
    and with them other last bits.
    """
    indexes = store.chunk_indexes(chunk)
    try:
        images, labels = draw(torch.arange(indexes.start, indexes.start + store.chunk_size))
    except ValueError as error:
        return str(error)
    count = len(indexes)
    store.write_chunk(chunk, images[:count].cpu().numpy(), labels[:count].cpu().numpy())
    return None
