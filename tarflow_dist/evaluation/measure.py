"""The second stage of `sample_fid`: from images to a `FeatureSet`, each rank taking its share.
Images are never gathered."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tarflow_dist.distributed import Counter, barrier, from_main, is_main, to_main
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.feature_set import FeatureSet, Statistics
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.image_sets import ImageSet, Samples
from tarflow_dist.evaluation.neighbours import Neighbours
from tarflow_dist.evaluation.reference_set import Reference
from tarflow_dist.telemetry.progress import Progress

SPLITS = 10
"""Of the Inception Score."""


def measure_samples(
    samples: Samples,
    extractor: FeatureExtractor,
    file: Path,
    label: str,
    *,
    batch_size: int,
    device: torch.device,
) -> None:
    """Leaves their features in `file`, unless they are there. Collective."""
    about: dict[str, Any] = {}
    if is_main():
        about = {"samples_sha256": samples.sha256(), **describe_extractor(extractor)}
    if from_main(is_main() and _is_measured(file, about)):
        return
    measured = measure(
        samples, extractor, label, keep=len(samples), batch_size=batch_size, device=device
    )
    if measured is not None:
        measured.about.update(about)
        measured.save(file)
    barrier()


def _is_measured(file: Path, about: dict[str, Any]) -> bool:
    try:
        there = FeatureSet.load(file)
    except UserError:  # not there, or damaged
        return False
    return there.features is not None and there.about.items() >= about.items()


def measure_reference(
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    device: torch.device,
    neighbours: Neighbours | None = None,
) -> FeatureSet:
    """Its features, on every rank, and on the way the nearest `neighbours`. Collective."""
    if reference.images is None:
        assert reference.statistics is not None
        return reference.statistics
    measured = from_main(
        measure(
            reference.images,
            extractor,
            "reference",
            keep=reference.keep,
            batch_size=batch_size,
            device=device,
            neighbours=neighbours,
        )
    )
    assert measured is not None
    if reference.statistics is None:
        return measured
    return replace(reference.statistics, features=measured.features)


@torch.no_grad()
def measure(
    image_set: ImageSet,
    extractor: FeatureExtractor,
    label: str,
    *,
    keep: int,
    batch_size: int,
    device: torch.device,
    neighbours: Neighbours | None = None,
) -> FeatureSet | None:
    """The features of a set of images, of which each rank takes its share. Collective.

    Args:
        label: says in the progress, which is over all ranks, what is measured.
        keep: images whose features are kept themselves, spread evenly over the set; their class
            scores make the Inception Score.
        neighbours: looked for on the way.

    Returns:
        On rank 0 the whole set's, on the others None.
    """
    total = len(image_set)
    pooled = Statistics(extractor.dim, device)
    spatial = Statistics(extractor.spatial_dim, device)
    wanted = np.unique(np.linspace(0, total - 1, min(keep, total)).round().astype(np.int64))
    kept = []
    seen, shown = Counter(), 0
    with Progress(label, total, enabled=is_main()) as progress:
        for index, images in image_set.batches(batch_size):
            features = extractor(images.to(device))
            pooled.add(features.pooled)
            if features.spatial is not None:
                spatial.add(features.spatial)
            places = np.isin(index.numpy(), wanted)
            logits = None if features.logits is None else features.logits.cpu().numpy()[places]
            kept.append(
                (index.numpy()[places], features.pooled.cpu().float().numpy()[places], logits)
            )
            if neighbours is not None:
                neighbours.add(index, features.pooled)
            before, shown = shown, seen.add(len(images))
            progress.update(shown - before)
        for sums in (pooled, spatial):
            sums.reduce()
        if shown < total:  # what the others finished after rank 0
            progress.update(total - shown)
    if neighbours is not None:
        neighbours.reduce()
    by_rank = to_main(kept)
    if by_rank is None:
        return None
    indexes, parts, logits_parts = zip(*(part for kept in by_rank for part in kept), strict=True)
    order = np.argsort(np.concatenate(indexes))
    scores = None
    if logits_parts[0] is not None:
        scores = inception_scores(torch.from_numpy(np.concatenate(logits_parts)[order]))
    return FeatureSet(
        pooled.gaussian(),
        spatial=spatial.gaussian() if extractor.spatial_dim else None,
        features=np.concatenate(parts)[order],
        split_scores=scores,
        about={"count": int(pooled.count), **describe_extractor(extractor)},
    )


def describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    return {"features": extractor.name, "features_sha256": extractor.weights_sha256}


def inception_scores(logits: Tensor) -> list[float]:
    """exp(E KL(p(y|x) ‖ p(y))) of each of ten splits of N images in their order, or of fewer where
    there are fewer images (arXiv 1606.03498), from the logits (N, K). The divergence is the entropy
    of the mean less the mean entropy."""
    N, scores = len(logits), []
    for split in range(SPLITS):
        p = logits[split * N // SPLITS : (split + 1) * N // SPLITS].double().softmax(dim=1)
        if len(p):
            entropy = torch.special.entr(p.mean(dim=0)).sum()
            scores.append(float((entropy - torch.special.entr(p).sum(dim=1).mean()).exp()))
    return scores
