"""The last stage of `sample_fid`: what is written of the results. Grids of samples are rows of one
class each, small images magnified; report.html is one file that needs nothing else."""

import base64
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from tarflow_dist.evaluation import sweep
from tarflow_dist.evaluation.export import WRITERS
from tarflow_dist.evaluation.image_sets import Samples
from tarflow_dist.evaluation.metrics import FIGURES, METRICS
from tarflow_dist.evaluation.neighbours import NeighboursOf
from tarflow_dist.evaluation.point import Point, Stages
from tarflow_dist.evaluation.result import best_of, denoising, figures, samples, write_result
from tarflow_dist.evaluation.result import show as show_result
from tarflow_dist.evaluation.sample_store import NO_LABEL, SampleStore
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.pictures import picture_grid, strip

ROWS, COLUMNS = 20, 10  # classes, and samples of each
LARGEST = 128  # pixels of an image's side as shown

# A class id, or None without classes, and sample indexes
Row = tuple[int | None, list[int]]

SHOWN_ELSEWHERE = {
    *FIGURES,
    *("not_measured", "warnings", "command", "samples_sha256", "seconds", "environment"),
    "more_features",
}


def report(
    out: Path,
    points: list[Point],
    results: list[dict[str, Any]],
    *,
    formats: list[str],
    class_names: list[str] | None,
    nearest: list[list[NeighboursOf]],
    stages: Stages,
) -> None:
    """Writes each point's result and grid, its samples in further `formats`, and the report, and
    prints the gist. The figures are there before what can fail."""
    best = best_of(results)
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
            neighbours=nearest[best],
            sweep_plot=plot,
        )
    for one in results:
        one["seconds"] |= stages.seconds
    _save(out, points, results)
    if len(points) > 1:
        sweep.show(results, best)
    show_result(results[best], out)


def _save(out: Path, points: list[Point], results: list[dict[str, Any]]) -> None:
    """Each point's result.json, and that of the sweep."""
    for point, one in zip(points, results, strict=True):
        write_result(one, point.folder / "result.json")
    if len(points) > 1:
        by_name = {point.name: one for point, one in zip(points, results, strict=True)}
        whole = {"best": points[best_of(results)].name, "points": by_name}
        write_result(whole, out / "result.json")


def class_rows(labels: NDArray[np.int64], rows: int, columns: int) -> list[Row]:
    """Up to `columns` samples of each of up to `rows` classes, spread over all there are, given all
    samples' labels; of an unconditional model the first samples, in as many rows as fill up."""
    classes = np.unique(labels[labels != NO_LABEL])
    if not len(classes):
        columns = min(columns, len(labels))
        rows = min(rows, len(labels) // columns)
        indexes = np.arange(rows * columns).reshape(rows, columns)
        return [(None, row) for row in indexes.tolist()]
    spread = np.linspace(0, len(classes) - 1, min(rows, len(classes))).round().astype(int)
    return [(int(c), np.flatnonzero(labels == c)[:columns].tolist()) for c in classes[spread]]


def write_grid(
    drawn: Samples,
    file: Path,
    names: list[str] | None = None,
) -> None:
    """A PNG with a row for each of up to 20 classes, under their `names` or numbers."""
    wanted = class_rows(drawn.labels(), ROWS, COLUMNS)
    named = [class_name(label, names) for label, _ in wanted if label is not None]
    pictures = [drawn.images(indexes) for _, indexes in wanted]
    with write_whole(file) as part:
        picture_grid(pictures, named, LARGEST).save(part, "PNG")


def class_name(label: int, names: list[str] | None) -> str:
    """What a class is called, or its number where that isn't known."""
    return names[label] if names else str(label)


def write_report(
    file: Path,
    results: list[dict[str, Any]],
    best: int,
    *,
    drawn: Samples,
    class_names: list[str] | None,
    neighbours: list[NeighboursOf],
    sweep_plot: Path | None,
) -> None:
    """Writes the report of one result or of a sweep's.

    Args:
        results: as in result.json.
        best: the place of the one that is shown in full.
        drawn: its samples.
        neighbours: of some of its samples; empty if the reference has no images.
        sweep_plot: a PNG.
    """
    environment = Environment(
        loader=PackageLoader("tarflow_dist.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = data_url
    shown = results[best]
    page = environment.get_template("report.html.jinja").render(
        results=results,
        best=shown,
        source=shown.get("model") or shown["samples"],
        figures=figures,
        denoising=denoising,
        samples=samples,
        meanings={metric.title_on(shown["features"]): metric.meaning for metric in METRICS},
        dependencies={k: v for k, v in shown.items() if k not in SHOWN_ELSEWHERE}
        | shown["environment"],
        rows=list(_rows(drawn, class_names)),
        neighbours=neighbours,
        strip=partial(strip, largest=LARGEST),
        sweep_plot=sweep_plot and Image.open(sweep_plot),
    )
    with write_whole(file) as part:
        part.write_text(page, encoding="utf-8")


def _rows(drawn: Samples, class_names: list[str] | None) -> Iterator[tuple[str, Image.Image]]:
    """A name and a strip of samples for each class that is shown."""
    for label, indexes in class_rows(drawn.labels(), ROWS, COLUMNS):
        name = "" if label is None else class_name(label, class_names)
        yield name, strip(drawn.images(indexes), LARGEST)


def data_url(picture: Image.Image) -> Markup:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
