"""From images to a `FeatureSet`, each rank taking its share. Images are never gathered."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist.data.loader import eval_batches
from tarflow_dist.data.shards import Shards
from tarflow_dist.distributed import Counter, is_main, rank, sum_over_ranks, to_main, world_size
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation import feature_set
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.neighbours import Neighbours
from tarflow_dist.evaluation.statistics import Statistics
from tarflow_dist.evaluation.store import SampleStore
from tarflow_dist.telemetry.progress import Progress

NUM_WORKERS = 2  # processes a rank that read and decode a data set
SPLITS = 10  # of the Inception Score

# Image indexes (B,) and uint8 images (B, C, H, W)
Batches = Iterable[tuple[Tensor, Tensor]]


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


@torch.no_grad()
def measure(
    batches: Batches,
    extractor: FeatureExtractor,
    *,
    label: str,
    total: int,
    keep: int,
    device: torch.device,
    neighbours: Neighbours | None = None,
) -> FeatureSet | None:
    """The features of a set of `total` images, each of which is in one rank's `batches`.

    Args:
        label: says in the progress, which is over all ranks, what is measured.
        keep: images whose features are kept themselves, spread evenly over the set.
        neighbours: looked for on the way.

    Returns:
        On rank 0 the whole set's, on the others None.
    """
    pooled = Statistics(extractor.dim, device)
    spatial = Statistics(extractor.spatial_dim, device)
    scores = InceptionScore(total, extractor.num_classes, device)
    wanted = np.unique(np.linspace(0, total - 1, min(keep, total)).round().astype(np.int64))
    kept: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    seen, shown = Counter(), 0
    with Progress(label, total, enabled=is_main()) as progress:
        for index, images in batches:
            features = extractor(images.to(device))
            pooled.add(features.pooled)
            if features.spatial is not None:
                spatial.add(features.spatial)
            if features.logits is not None:
                scores.add(index, features.logits)
            places = np.isin(index.numpy(), wanted)
            kept.append((index.numpy()[places], features.pooled.cpu().float().numpy()[places]))
            if neighbours is not None:
                neighbours.add(index, features.pooled)
            before, shown = shown, seen.add(len(images))
            progress.update(shown - before)
        for sums in (pooled, spatial, scores):
            sums.reduce()
        if shown < total:  # what the others finished after rank 0
            progress.update(total - shown)
    if neighbours is not None:
        neighbours.reduce()
    parts = to_main(_joined(kept, extractor.dim))
    if parts is None:
        return None
    order, features_kept = _joined(parts, extractor.dim)
    return FeatureSet(
        pooled.gaussian(),
        spatial=spatial.gaussian() if extractor.spatial_dim else None,
        features=features_kept[np.argsort(order)],
        split_scores=scores.of_splits() if extractor.num_classes else None,
        about={"count": int(pooled.count), **describe_extractor(extractor)},
    )


def describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    return {"features": extractor.name, "features_sha256": extractor.weights_sha256}


def _joined(
    parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]], dim: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    nothing = (np.empty(0, np.int64), np.empty((0, dim), np.float32))
    indexes, features = zip(nothing, *parts, strict=True)
    return np.concatenate(indexes), np.concatenate(features)


class InceptionScore:
    """exp(E KL(p(y|x) ‖ p(y))) of each of ten splits of the set, in the order of the images
    (arXiv 1606.03498). Keeps Σp and Σ p·log p of each split, for
    E KL(p ‖ q) = E Σ p·log p − Σ q·log q where q = E p.

    Args:
        total: N; split s has the images s·N//10 to (s + 1)·N//10.
        num_classes: K.
    """

    def __init__(self, total: int, num_classes: int, device: torch.device | str = "cpu"):
        self._ends = torch.tensor([(s + 1) * total // SPLITS for s in range(SPLITS)])
        self._counts = torch.zeros(SPLITS, dtype=torch.float64, device=device)
        self._p = torch.zeros(SPLITS, num_classes, dtype=torch.float64, device=device)
        self._p_log_p = torch.zeros(SPLITS, dtype=torch.float64, device=device)

    def add(self, index: Tensor, logits: Tensor) -> None:
        """Takes the logits (B, K) of the images `index` (B,)."""
        split = torch.searchsorted(self._ends, index, right=True).to(self._p.device)
        log_p = logits.to(self._p).log_softmax(dim=1)
        p = log_p.exp()
        self._counts.index_add_(0, split, torch.ones_like(p[:, 0]))
        self._p.index_add_(0, split, p)
        self._p_log_p.index_add_(0, split, (p * log_p).sum(dim=1))

    def reduce(self) -> None:
        """Adds up all ranks' sums, in place."""
        for total in (self._counts, self._p, self._p_log_p):
            sum_over_ranks(total)

    def of_splits(self) -> list[float]:
        """The score of each split that has images."""
        q = self._p / self._counts[:, None]
        divergence = self._p_log_p / self._counts - torch.special.xlogy(q, q).sum(dim=1)
        return [score for score in divergence.exp().tolist() if not math.isnan(score)]


def sample_batches(store: SampleStore) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the store, a chunk at a time."""
    for chunk in range(rank(), store.num_chunks, world_size()):
        images = torch.from_numpy(store.read_images(chunk)).permute(0, 3, 1, 2)
        yield torch.tensor(store.chunk_indexes(chunk)), images


def shard_batches(shards: Shards, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a data set, as it is stored: no flips, no crops."""
    batches = eval_batches(
        shards,
        batch_size=batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=NUM_WORKERS,
    )
    return ((batch.index, batch.images) for batch in batches)


def npz_batches(file: Path, batch_size: int, channels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the images in an .npz of ADM's, which has grey ones in three channels;
    of those, one is given if `channels` is 1.

    Raises:
        UserError: one is wanted, and they are not grey.
    """
    parts = feature_set.image_batches(file, batch_size, rank=rank(), world_size=world_size())
    for index, images in parts:
        if channels == 1 and (images != images[..., :1]).any():
            raise UserError(f"{file} holds colour images and the model's are grey")
        yield torch.from_numpy(index), torch.tensor(images[..., :channels]).permute(0, 3, 1, 2)
