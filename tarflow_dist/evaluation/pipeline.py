"""The stages of `sample_fid`: draw, measure, compare, report. All ranks call `run`."""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tarflow_dist import distributed
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation import metrics, result, sweep
from tarflow_dist.evaluation.export import WRITERS
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.features import FeatureExtractor, make_extractor
from tarflow_dist.evaluation.grid import write_grid
from tarflow_dist.evaluation.measure import describe_extractor, measure, sample_batches
from tarflow_dist.evaluation.neighbours import Neighbours, NeighboursOf, show_neighbours
from tarflow_dist.evaluation.reference_set import Reference, ShardsReference, open_reference
from tarflow_dist.evaluation.report import write_report
from tarflow_dist.evaluation.result import Stages
from tarflow_dist.evaluation.sampling import draw_missing_chunks, make_draw
from tarflow_dist.evaluation.settings import hash_weights, sweep_settings
from tarflow_dist.evaluation.store import SampleStore
from tarflow_dist.evaluation.wandb_log import TrainingRun, log_to_run
from tarflow_dist.options import dtype_on
from tarflow_dist.pretrained import TarFlow
from tarflow_dist.telemetry.environment import describe_environment

SHOWN_NEIGHBOURS = (8, 6)  # samples, and training images for each
FEATURES_FILE = "features.npz"


@dataclass
class Point:
    """One point of a sweep, or the only one."""

    name: str
    store: SampleStore
    drawn: dict[str, Any] = field(default_factory=dict)
    stages: Stages = field(default_factory=Stages)
    first_features: torch.Tensor | None = None
    """Of the samples whose neighbours are looked for."""

    @property
    def features_file(self) -> Path:
        return self.store.folder / FEATURES_FILE


def run(args: argparse.Namespace, training_run: TrainingRun | None) -> None:
    """`args` are those of `sample_fid`; `training_run` is where the result is logged besides."""
    # rank 0 compares and reports alone, for minutes, and the others wait
    device = distributed.init(timeout=timedelta(days=1))
    stages = Stages()
    with stages.stage("loading"):
        flow = TarFlow.from_pretrained(args.model).requires_grad_(False)
        flow = flow.to(device, dtype_on(flow, device, args.dtype))
        extractor = make_extractor(
            args.features,
            image_shape=flow.image_shape,
            inception_weights=args.inception_weights,
            device=device,
        )
        reference = open_reference(
            args.reference,
            args.split,
            image_shape=flow.image_shape,
            num_classes=flow.num_classes,
            extractor=extractor,
        )
        weights = distributed.from_main(hash_weights(args.model) if distributed.is_main() else "")
        settings = sweep_settings(args, flow, weights)
        points = [Point(name, SampleStore(args.out / name, s)) for name, s in settings.items()]
    with distributed.only_job(args.out):
        if distributed.is_main():
            _begin(points)
        for _, group in groupby(points, lambda point: point.store.settings["guidance"]):
            _draw_samples(flow, list(group), device)
        for point in points:
            with point.stages.stage("sample_features"):
                _measure_samples(point, extractor, device)
        with stages.stage("reference_features"):
            real, neighbours = _measure_reference(
                reference, extractor, points, args.batch_size, device
            )
        facts = {
            "model": str(args.model),
            **describe_extractor(extractor),
            **reference.describe(),
            **result.describe_machine(device),
            "command": args.command,
        }
        if real is not None:
            results = [_compare(point, real, facts, device) for point in points]
            best = min(range(len(results)), key=lambda i: results[i]["frechet_distance"])
            _save_results(args.out, points, results, best)  # before what can fail
            with stages.stage("outputs"):
                found = _show_neighbours(neighbours, points, best, reference, extractor)
                _write_outputs(
                    args, points, results, best, flow.class_names or reference.class_names, found
                )
            for one in results:
                one["seconds"] |= stages.seconds
            _save_results(args.out, points, results, best)
            if training_run is not None:
                by_folder = {p.store.folder: one for p, one in zip(points, results, strict=True)}
                log_to_run(training_run, by_folder)
            result.show(results[best], args.out)
    distributed.shutdown()


def _begin(points: list[Point]) -> None:
    """Makes the points' stores, and says how they are filled."""
    for point in points:
        point.store.begin()
    for sampler in dict.fromkeys(point.store.settings["sampler"] for point in points):
        print(f"sampler: {sampler}", flush=True)


def _draw_samples(flow: TarFlow, points: list[Point], device: torch.device) -> None:
    """Fills the points' stores. The points differ in the denoising step alone, so each has the
    others' time too. Collective."""
    stores = [point.store for point in points]
    with ExitStack() as stages:
        for point in points:
            stages.enter_context(point.stages.stage("sampling"))
        drawn = draw_missing_chunks(
            stores,
            make_draw(flow, [store.settings for store in stores]),
            f"sampling {', '.join(point.name for point in points)}".strip(),
            distributed.device_name(device),
        )
    for point, chunks in zip(points, drawn.chunks, strict=True):
        point.drawn = result.describe_drawing(drawn, chunks)


def _measure_samples(point: Point, extractor: FeatureExtractor, device: torch.device) -> None:
    """Leaves the features of the point's samples in its folder. Collective."""
    file, who = point.features_file, {}
    if distributed.is_main():
        who = {"samples_sha256": point.store.sha256(), **describe_extractor(extractor)}
    if not distributed.from_main(distributed.is_main() and _is_measured(file, who)):
        measured = measure(
            sample_batches(point.store),
            extractor,
            label=f"features {point.name}".strip(),
            total=point.store.num_samples,
            keep=point.store.num_samples,
            device=device,
        )
        if measured is not None:
            measured.about.update(who)
            measured.save(file)
    first = None
    if distributed.is_main():
        features = FeatureSet.load(file).features
        assert features is not None
        first = torch.from_numpy(features[: SHOWN_NEIGHBOURS[0]].copy())
    point.first_features = distributed.from_main(first)


def _is_measured(file: Path, who: dict[str, Any]) -> bool:
    try:
        there = FeatureSet.load(file)
    except UserError:  # not there, or damaged
        return False
    return there.features is not None and there.about.items() >= who.items()


def _measure_reference(
    reference: Reference,
    extractor: FeatureExtractor,
    points: list[Point],
    batch_size: int,
    device: torch.device,
) -> tuple[FeatureSet | None, Neighbours | None]:
    """The reference's features, on rank 0, and those of its images, if it has any, that are nearest
    to the points' first samples. Collective."""
    if not isinstance(reference, ShardsReference):
        return reference.measure(extractor, batch_size=batch_size, device=device), None
    queries = torch.cat([p.first_features for p in points if p.first_features is not None])
    neighbours = Neighbours(queries.to(device), SHOWN_NEIGHBOURS[1])
    real = reference.measure(extractor, batch_size=batch_size, device=device, neighbours=neighbours)
    return real, neighbours


def _show_neighbours(
    neighbours: Neighbours | None,
    points: list[Point],
    best: int,
    reference: Reference,
    extractor: FeatureExtractor,
) -> list[NeighboursOf]:
    """Those of the samples of `points[best]`; none if the reference has no images."""
    if neighbours is None or not isinstance(reference, ShardsReference):
        return []
    count = len(neighbours.indexes) // len(points)
    return show_neighbours(
        neighbours, best * count, count, points[best].store, reference.images, extractor
    )


def _compare(
    point: Point, real: FeatureSet, facts: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """The result of one point."""
    dim = len(real.pooled.mean)
    with point.stages.stage("metrics", f"comparing {dim} features {point.name}".rstrip()):
        samples = FeatureSet.load(point.features_file)
        figures = metrics.compare(samples, real, device)
    return {
        **figures,
        "warnings": metrics.warnings(figures, samples, real),
        **facts,
        **point.store.settings,
        "samples_sha256": point.store.sha256(),
        "sample_devices": point.store.devices(),
        "redrawn_samples": point.store.redrawn(),
        **point.drawn,
        "seconds": point.stages.seconds,
        "environment": describe_environment(),
    }


def _write_outputs(
    args: argparse.Namespace,
    points: list[Point],
    results: list[dict[str, Any]],
    best: int,
    class_names: list[str] | None,
    neighbours: list[NeighboursOf],
) -> None:
    for point in points:
        for form in args.write:
            WRITERS[form](point.store)
        write_grid(point.store, point.store.folder / "grid.png", class_names)
    plot = None
    if len(points) > 1:
        plot = args.out / "sweep.png"
        sweep.write_csv(results, args.out / "sweep.csv")
        sweep.plot(results, plot)
    write_report(
        args.out / "report.html",
        results,
        best,
        store=points[best].store,
        class_names=class_names,
        neighbours=neighbours,
        sweep_plot=plot,
    )


def _save_results(out: Path, points: list[Point], results: list[dict[str, Any]], best: int) -> None:
    for point, one in zip(points, results, strict=True):
        result.write_result(one, point.store.folder / "result.json")
    if len(points) > 1:
        by_name = {point.name: one for point, one in zip(points, results, strict=True)}
        result.write_result({"best": points[best].name, "points": by_name}, out / "result.json")
