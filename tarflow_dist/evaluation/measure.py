"""The second stage of `sample_fid`: from images to a `FeatureSet`, each rank taking its share.
Images are never gathered."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_dist.distributed import Counter, from_main, is_main, to_main
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.image_sets import ImageSet
from tarflow_dist.evaluation.neighbours import Neighbours, NeighboursOf, show_neighbours
from tarflow_dist.evaluation.point import Point, Stages
from tarflow_dist.evaluation.reference_set import Reference
from tarflow_dist.evaluation.statistics import InceptionScore, Statistics
from tarflow_dist.telemetry.progress import Progress

SHOWN_NEIGHBOURS = (8, 6)  # samples, and training images for each


@dataclass(frozen=True)
class Measured:
    """What one extractor saw in all points and in the reference.

    Attributes:
        about: the extractor, as a result says it.
        files: of each point's `FeatureSet`.
        reference: what they are compared with.
        nearest: for each point the images of the reference nearest to its first samples, on rank 0;
            none where nothing was searched, or the reference has no images.
    """

    about: dict[str, Any]
    files: list[Path]
    reference: FeatureSet
    nearest: list[list[NeighboursOf]]


def measure_points(
    points: list[Point],
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    file: str,
    search: bool,
    batch_size: int,
    device: torch.device,
    stages: Stages,
) -> Measured:
    """Leaves each point's features in its folder as `file`. Collective.

    Args:
        search: whether the images of the reference nearest to samples are looked for.
    """
    first: list[torch.Tensor] = []
    for point in points:
        with point.stages.stage("sample_features"):
            first.append(
                _measure_samples(point, extractor, point.folder / file, batch_size, device)
            )
    searched = reference.searchable if search else None
    neighbours = None
    if searched is not None:
        neighbours = Neighbours(torch.cat(first), SHOWN_NEIGHBOURS[1], device)
    with stages.stage("reference_features"):
        real = measure_reference(
            reference, extractor, batch_size=batch_size, device=device, neighbours=neighbours
        )
        real = from_main(real)
        assert real is not None
        nearest: list[list[NeighboursOf]] = [[] for _ in points]
        if neighbours is not None and searched is not None and is_main():
            count = len(first[0])
            nearest = [
                show_neighbours(neighbours, n * count, count, p.samples, searched, extractor)
                for n, p in enumerate(points)
            ]
    files = [point.folder / file for point in points]
    return Measured(describe_extractor(extractor), files, real, nearest)


def _measure_samples(
    point: Point, extractor: FeatureExtractor, file: Path, batch_size: int, device: torch.device
) -> torch.Tensor:
    """Writes `file` unless it is there; gives the features of the samples whose neighbours are
    looked for."""
    who: dict[str, Any] = {}
    measured = None
    if is_main():
        who = {"samples_sha256": point.samples.sha256(), **describe_extractor(extractor)}
        measured = _measured_before(file, who)
    if not from_main(measured is not None):
        measured = measure(
            point.samples,
            extractor,
            label=f"features {point.name}".strip(),
            batch_size=batch_size,
            keep=len(point.samples),
            device=device,
        )
        if measured is not None:
            measured.about.update(who)
            measured.save(file)
    first = None
    if measured is not None:
        assert measured.features is not None
        first = torch.from_numpy(measured.features[: SHOWN_NEIGHBOURS[0]].copy())
    first = from_main(first)
    assert first is not None
    return first


def _measured_before(file: Path, who: dict[str, Any]) -> FeatureSet | None:
    try:
        there = FeatureSet.load(file)
    except UserError:  # not there, or damaged
        return None
    return there if there.features is not None and there.about.items() >= who.items() else None


def measure_reference(
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    device: torch.device,
    neighbours: Neighbours | None = None,
) -> FeatureSet | None:
    """Its features, on rank 0, and on the way the nearest `neighbours`. Collective."""
    if reference.images is None:
        return reference.statistics
    measured = measure(
        reference.images,
        extractor,
        label="reference",
        batch_size=batch_size,
        keep=reference.keep,
        device=device,
        neighbours=neighbours,
    )
    if reference.statistics is None or measured is None:
        return measured
    return replace(reference.statistics, features=measured.features)


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
