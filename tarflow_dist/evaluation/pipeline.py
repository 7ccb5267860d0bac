"""The stages of `sample_fid`: draw, measure, compare, and what is written. All ranks call each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tarflow_dist import distributed
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation import metrics, result, sweep
from tarflow_dist.evaluation.draw import draw_missing_chunks, make_draw
from tarflow_dist.evaluation.export import WRITERS
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.grid import write_grid
from tarflow_dist.evaluation.image_sets import Samples
from tarflow_dist.evaluation.measure import describe_extractor, measure
from tarflow_dist.evaluation.neighbours import Neighbours, NeighboursOf, show_neighbours
from tarflow_dist.evaluation.reference_set import Reference
from tarflow_dist.evaluation.report import write_report
from tarflow_dist.evaluation.result import Stages
from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.evaluation.settings import SampleSettings
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.telemetry.environment import describe_environment

SHOWN_NEIGHBOURS = (8, 6)  # samples, and training images for each
FEATURES_FILE = "features.npz"
UNEVEN = 2  # how many times the images of the smallest class the largest may have, unsaid


@dataclass
class Point:
    """One point of a sweep, or the only one.

    Attributes:
        folder: of its files.
        facts: what a result says of its samples, as JSON values.
        first_features: (Q, F) of the samples whose neighbours are looked for.
    """

    name: str
    folder: Path
    samples: Samples
    facts: dict[str, Any]
    stages: Stages = field(default_factory=Stages)
    first_features: torch.Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """What the points are compared with; their own features lie in their folders."""

    reference: FeatureSet
    neighbours: Neighbours | None
    """Of all points' first samples; None if the reference has no images to search."""


def draw(
    flow: TarFlow, settings: dict[str, SampleSettings], out: Path, device: torch.device
) -> list[Point]:
    """Draws what is missing of each point, by its name, into stores below `out`."""
    stores = {name: SampleStore(out / name, chosen.to_json()) for name, chosen in settings.items()}
    if distributed.is_main():
        for store in stores.values():
            store.begin()
        for sampler in dict.fromkeys(chosen.sampler for chosen in settings.values()):
            print(f"sampler: {sampler}", flush=True)
    points: list[Point] = []
    # points that differ in the denoising alone share the decoding
    for _, names in groupby(settings, lambda name: settings[name].guidance):
        alike = {name: settings[name] for name in names}
        points += _draw_together(flow, alike, [stores[name] for name in alike], device)
    return points


def given(path: Path, samples: Samples, out: Path) -> Point:
    """The samples of `path`, which another program drew, with its results in `out`."""
    return Point("", out, samples, {"samples": str(path), "num_samples": len(samples)})


def _draw_together(
    flow: TarFlow,
    settings: dict[str, SampleSettings],
    stores: list[SampleStore],
    device: torch.device,
) -> list[Point]:
    """Each point has the others' time too."""
    stages = Stages()
    with stages.stage("sampling"):
        drawn = draw_missing_chunks(
            stores,
            make_draw(flow, list(settings.values())),
            f"sampling {', '.join(settings)}".strip(),
            distributed.device_name(device),
        )
    points = []
    for place, (name, store) in enumerate(zip(settings, stores, strict=True)):
        facts = {
            **store.settings,
            "sample_devices": store.devices(),
            "redrawn_samples": store.redrawn(),
            **drawn.describe(place),
        }
        points.append(Point(name, store.folder, store, facts, Stages(stages.seconds)))
    return points


def measure_all(
    points: list[Point],
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    device: torch.device,
    stages: Stages,
) -> Measured:
    """Leaves each point's features in its folder, and gives those of the reference."""
    for point in points:
        with point.stages.stage("sample_features"):
            _measure_samples(point, extractor, batch_size, device)
    neighbours = None
    if reference.searchable is not None:
        queries = torch.cat([p.first_features for p in points if p.first_features is not None])
        neighbours = Neighbours(queries.to(device), SHOWN_NEIGHBOURS[1])
    with stages.stage("reference_features"):
        real = reference.measure(
            extractor, batch_size=batch_size, device=device, neighbours=neighbours
        )
        real = distributed.from_main(real)
    assert real is not None
    return Measured(real, neighbours)


def _measure_samples(
    point: Point, extractor: FeatureExtractor, batch_size: int, device: torch.device
) -> None:
    file, who = point.folder / FEATURES_FILE, {}
    measured = None
    if distributed.is_main():
        who = {"samples_sha256": point.samples.sha256(), **describe_extractor(extractor)}
        measured = _measured_before(file, who)
    if not distributed.from_main(measured is not None):
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
    point.first_features = distributed.from_main(first)


def _measured_before(file: Path, who: dict[str, Any]) -> FeatureSet | None:
    try:
        there = FeatureSet.load(file)
    except UserError:  # not there, or damaged
        return None
    return there if there.features is not None and there.about.items() >= who.items() else None


def compare(
    points: list[Point],
    measured: Measured,
    facts: dict[str, Any],
    class_counts: Sequence[int] | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The result of each point, on rank 0; `facts` are those of all, `class_counts` the reference's
    images of each class. Collective."""
    results = []
    dim = len(measured.reference.pooled.mean)
    for point in points:
        with point.stages.stage("metrics", f"comparing {dim} features {point.name}".rstrip()):
            samples = FeatureSet.load(point.folder / FEATURES_FILE)  # one point's at a time
            comparison = metrics.compare(samples, measured.reference, device)
        if not distributed.is_main():
            continue
        note = another_mix(point.facts.get("labels"), class_counts)
        results.append(
            {
                **comparison.to_json(),
                "warnings": [*comparison.warnings, *note],
                **facts,
                **point.facts,
                "samples_sha256": samples.about["samples_sha256"],
                "seconds": point.stages.seconds,
                "environment": describe_environment(),
            }
        )
    return results


def neighbours_of(
    points: list[Point],
    results: list[dict[str, Any]],
    measured: Measured,
    reference: Reference,
    extractor: FeatureExtractor,
) -> list[NeighboursOf]:
    """Those of the samples of the best point; none if the reference has no images to search."""
    found = measured.neighbours
    if found is None or reference.searchable is None:
        return []
    best = _best(results)
    count = len(found.indexes) // len(points)
    samples = points[best].samples
    return show_neighbours(found, best * count, count, samples, reference.searchable, extractor)


def another_mix(labels: str | None, class_counts: Sequence[int] | None) -> list[str]:
    """A sentence where samples of evenly drawn `labels` are compared with uneven classes."""
    if labels not in ("random", "balanced") or not class_counts:
        return []
    least, most = min(class_counts), max(class_counts)
    if most <= UNEVEN * least:
        return []
    return [
        f"labels are drawn evenly, and the reference's classes have {least:,} to {most:,} images: "
        "--labels reference draws its mix"
    ]


def report(
    out: Path,
    points: list[Point],
    results: list[dict[str, Any]],
    *,
    formats: list[str],
    class_names: list[str] | None,
    neighbours: list[NeighboursOf],
    stages: Stages,
) -> None:
    """Writes each point's result and grid, its samples in further `formats`, and the report, and
    prints the gist. The figures are there before what can fail."""
    best = _best(results)
    _save(out, points, results)
    with stages.stage("outputs"):
        for point in points:
            for form in formats:
                assert isinstance(point.samples, SampleStore)
                WRITERS[form](point.samples)
            write_grid(point.samples, point.folder / "grid.png", class_names)
        plot = None
        if len(points) > 1:
            plot = out / "sweep.png"
            sweep.write_csv(results, out / "sweep.csv")
            sweep.plot(results, plot)
        write_report(
            out / "report.html",
            results,
            best,
            drawn=points[best].samples,
            class_names=class_names,
            neighbours=neighbours,
            sweep_plot=plot,
        )
    for one in results:
        one["seconds"] |= stages.seconds
    _save(out, points, results)
    if len(points) > 1:
        sweep.show(results, best)
    result.show(results[best], out)


def _best(results: list[dict[str, Any]]) -> int:
    return min(range(len(results)), key=lambda place: results[place]["frechet_distance"])


def _save(out: Path, points: list[Point], results: list[dict[str, Any]]) -> None:
    """Each point's result.json, and that of the sweep."""
    for point, one in zip(points, results, strict=True):
        result.write_result(one, point.folder / "result.json")
    if len(points) > 1:
        by_name = {point.name: one for point, one in zip(points, results, strict=True)}
        whole = {"best": points[_best(results)].name, "points": by_name}
        result.write_result(whole, out / "result.json")
