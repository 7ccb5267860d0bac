"""Statistics of the features of an image set, each rank taking its share."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tarflow_dist.data.loader import eval_batches
from tarflow_dist.data.shards import Shards
from tarflow_dist.distributed import is_main, rank, world_size
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.statistics import Statistics
from tarflow_dist.evaluation.store import SampleStore
from tarflow_dist.telemetry.progress import Progress

NUM_WORKERS = 2  # processes a rank that read and decode a data set


def check_image_shape(
    folder: Path | str, shape: tuple[int, int, int], image_shape: tuple[int, int, int]
) -> None:
    """Raises `UserError` if the images of `folder` are of another `shape` (C, H, W) than the
    model's."""
    if shape != image_shape:
        there, wanted = ("×".join(map(str, s)) for s in (shape, image_shape))
        raise UserError(
            f"the images of {folder} are {there} and the model's are {wanted} (channels × height × "
            "width): prepare a set of that size with data_prep"
        )


def measure(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    *,
    label: str,
    share: int,
    device: torch.device,
) -> Statistics:
    """Statistics over all ranks' `batches` of uint8 images (B, C, H, W). Progress is that of this
    rank, which has `share` images."""
    statistics = Statistics(extractor.dim, device)
    with Progress(label, share, enabled=is_main()) as progress:
        for images in batches:
            statistics.add(extractor(images.to(device)))
            progress.update(len(images))
    statistics.reduce()
    return statistics


def sample_batches(store: SampleStore) -> tuple[Iterator[Tensor], int]:
    """This rank's share of the store, a chunk at a time as uint8 (B, C, H, W), and its size."""
    chunks = range(rank(), store.num_chunks, world_size())
    batches = (torch.from_numpy(store.read_images(c)).permute(0, 3, 1, 2) for c in chunks)
    return batches, sum(len(store.chunk_indexes(c)) for c in chunks)


def reference_batches(shards: Shards, batch_size: int) -> tuple[Iterator[Tensor], int]:
    """This rank's share of a data set as uint8 (B, C, H, W), and its size."""
    batches = eval_batches(
        shards,
        batch_size=batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=NUM_WORKERS,
    )
    return (batch.images for batch in batches), len(range(rank(), len(shards), world_size()))
