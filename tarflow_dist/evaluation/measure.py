"""From images to a `FeatureSet`, each rank taking its share. Images are never gathered."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_dist.distributed import Counter, is_main, to_main
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.image_sets import ImageSet
from tarflow_dist.evaluation.neighbours import Neighbours
from tarflow_dist.evaluation.statistics import InceptionScore, Statistics
from tarflow_dist.telemetry.progress import Progress


@torch.no_grad()
def measure(
    image_set: ImageSet,
    extractor: FeatureExtractor,
    *,
    label: str,
    batch_size: int,
    keep: int,
    device: torch.device,
    neighbours: Neighbours | None = None,
) -> FeatureSet | None:
    """The features of a set of images, of which each rank takes its share. Collective.

    Args:
        label: says in the progress, which is over all ranks, what is measured.
        keep: images whose features are kept themselves, spread evenly over the set.
        neighbours: looked for on the way.

    Returns:
        On rank 0 the whole set's, on the others None.
    """
    total = len(image_set)
    pooled = Statistics(extractor.dim, device)
    spatial = Statistics(extractor.spatial_dim, device)
    scores = InceptionScore(total, extractor.num_classes, device)
    wanted = np.unique(np.linspace(0, total - 1, min(keep, total)).round().astype(np.int64))
    kept: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    seen, shown = Counter(), 0
    with Progress(label, total, enabled=is_main()) as progress:
        for index, images in image_set.batches(batch_size):
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
