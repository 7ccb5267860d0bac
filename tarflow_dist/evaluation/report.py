"""The last stage of `sample_fid`: what is written of the results. Grids of samples are rows of one
class each, small images magnified; report.html is one file that needs nothing else; a sweep, over
the guidance weight and the steps of denoising, has a table and curves besides. `--wandb` logs
figures and grids with the training run that the model came from."""

import base64
import csv
import io
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from tarflow_dist import config_file as configs
from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.export import WRITERS
from tarflow_dist.evaluation.image_sets import NO_LABEL, Pixels, Samples
from tarflow_dist.evaluation.metrics import FIGURES, METRICS
from tarflow_dist.evaluation.neighbours import Neighbours, NeighboursOf
from tarflow_dist.evaluation.result import Result, best_of, denoising, figures, samples
from tarflow_dist.evaluation.result import show as show_result
from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.dashboards import open_dashboards
from tarflow_dist.telemetry.pictures import picture_grid, strip
from tarflow_dist.training import checkpoint, latest_checkpoint

ROWS, COLUMNS = 20, 10  # classes, and samples of each
LARGEST = 128  # pixels of an image's side as shown

CSV_COLUMNS = (
    *("guidance", "denoise", "denoise_steps", *FIGURES),
    *("num_samples", "redrawn_samples", "samples_sha256"),
)
PLOTTED = ("frechet_distance", "inception_score", "precision", "recall")

# A class id, or None without classes, and sample indexes
Row = tuple[int | None, list[int]]

SHOWN_ELSEWHERE = {
    *FIGURES,
    *("not_measured", "warnings", "command", "samples_sha256", "seconds", "environment"),
    "more_features",
}


@dataclass(frozen=True)
class TrainingRun:
    """Where the run that trained a model logs, and the images it has seen."""

    folder: Path
    log: LogConfig
    wandb_id: str
    images: int


def report(
    out: Path,
    drawn: Mapping[str, Samples],
    results: dict[str, Result],
    *,
    formats: list[str],
    class_names: list[str] | None,
    neighbours: Neighbours | None,
    training_run: TrainingRun | None,
) -> None:
    """Writes each point's result and grid, its samples in further `formats`, and the report, prints
    the gist, and logs to the training run if there is one. The figures are there before what can
    fail.

    Args:
        drawn: the samples of each point, by its name.
        neighbours: in the reference, of the points' samples, where they were looked for.
    """
    began = time.perf_counter()
    _save(out, results)
    for name, images in drawn.items():
        for form in formats:
            assert isinstance(images, SampleStore)
            WRITERS[form](images)
        write_grid(images, out / name / "grid.png", class_names)
    of_all, best = list(results.values()), best_of(results)
    place = list(results).index(best)
    plot = None
    if len(results) > 1:
        plot = out / "sweep.png"
        write_csv(of_all, out / "sweep.csv")
        plot_sweep(of_all, plot)
    write_report(
        out / "report.html",
        of_all,
        place,
        drawn=drawn[best],
        class_names=class_names,
        neighbours=[] if neighbours is None else neighbours.of(place),
        sweep_plot=plot,
    )
    for result in of_all:
        result["seconds"]["outputs"] = round(time.perf_counter() - began, 3)
    _save(out, results)
    if len(results) > 1:
        show_sweep(of_all, place)
    show_result(results[best], out)
    if training_run is not None:
        log_to_run(training_run, out, results)


def _save(out: Path, results: dict[str, Result]) -> None:
    """Each point's result.json, and that of the sweep."""
    files: dict[Path, Any] = {out / name / "result.json": one for name, one in results.items()}
    if len(results) > 1:
        files[out / "result.json"] = {"best": best_of(results), "points": results}
    for file, content in files.items():
        with write_whole(file) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")


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


def shown_rows(drawn: Samples, names: list[str] | None) -> list[tuple[str, Pixels]]:
    """Samples (B, H, W, C) of each of up to 20 classes, under its name, or its number where that
    isn't known; an unconditional model's under none."""
    rows = class_rows(drawn.labels(), ROWS, COLUMNS)
    called = ["" if label is None else names[label] if names else str(label) for label, _ in rows]
    return [(name, drawn.images(row)) for name, (_, row) in zip(called, rows, strict=True)]


def write_grid(drawn: Samples, file: Path, names: list[str] | None = None) -> None:
    """A PNG of `shown_rows`."""
    rows = shown_rows(drawn, names)
    grid = picture_grid([images for _, images in rows], [n for n, _ in rows if n], LARGEST)
    with write_whole(file) as part:
        grid.save(part, "PNG")


def write_report(
    file: Path,
    results: list[Result],
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
        rows=shown_rows(drawn, class_names),
        neighbours=neighbours,
        strip=partial(strip, largest=LARGEST),
        sweep_plot=sweep_plot and Image.open(sweep_plot),
    )
    with write_whole(file) as part:
        part.write_text(page, encoding="utf-8")


def data_url(picture: Image.Image) -> Markup:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())


def write_csv(results: list[Result], file: Path) -> None:
    """A row a point; empty where a figure was not measured."""
    with write_whole(file) as part, part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def show_sweep(results: list[Result], best: int) -> None:
    """Prints the table, `results[best]` marked."""
    header = ["guidance", "denoising", *figures(results[0])]
    rows = [[f"{r['guidance']:g}", denoising(r), *figures(r).values()] for r in results]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for place, row in enumerate([header, *rows], -1):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print((cells + ("  best" if place == best else "")).rstrip())


def plot_sweep(results: list[Result], file: Path) -> None:
    """Draws the figures that there are into a PNG, with error bars of one standard error: against
    the guidance weight, a curve for each way of denoising; or at one weight against the steps."""
    from matplotlib.figure import Figure

    panels = [m for m in METRICS if m.name in PLOTTED and results[0][m.name] is not None]
    by_steps = len({r["guidance"] for r in results}) == 1
    by_steps = by_steps and len({r.get("denoise_steps") for r in results if r["denoise"]}) > 1
    curves: dict[str, list[tuple[float, Result]]] = defaultdict(list)
    for result in results:
        if by_steps:
            place = result["denoise_steps"] if result["denoise"] else 0
            curves[f"w = {result['guidance']:g}"].append((place, result))
        else:
            curves[denoising(result)].append((result["guidance"], result))
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in curves.items():
            points.sort(key=itemgetter(0))
            axes.errorbar(
                [place for place, _ in points],
                [r[metric.name] for _, r in points],
                yerr=[r[metric.spread] or 0 for _, r in points] if metric.spread else None,
                label=label,
                marker="o",
                markersize=4,
                capsize=3,
            )
        axes.set(
            xlabel="denoising steps" if by_steps else "guidance w",
            title=metric.title_on(results[0]["features"]),
        )
        axes.grid(alpha=0.3)
        axes.legend()
    with write_whole(file) as part:
        figure.savefig(part, dpi=120, format="png")


def find_training_run(folder: Path, provenance: dict[str, Any]) -> TrainingRun:
    """The run that trained a model of this `provenance`, if it has a dashboard.

    Raises:
        UserError: it doesn't, or has no checkpoint yet.
    """
    log = configs.load_saved(folder)[0].log
    if log.wandb == "disabled" and not log.tensorboard:
        raise UserError(f"--wandb {folder}: this run was trained with log.wandb=disabled")
    newest = latest_checkpoint.newest(folder / latest_checkpoint.FOLDER)
    if newest is None:
        raise UserError(f"--wandb {folder}: this run has no checkpoint yet")
    state = checkpoint.Checkpoint(newest).state
    return TrainingRun(folder, log, state.wandb_id, provenance.get("images", state.images))


def log_to_run(run: TrainingRun, out: Path, results: dict[str, Result]) -> None:
    """Logs the figures and the grid of each point, by its name, under evaluation/, against the
    images that the run has seen."""
    boards = open_dashboards(
        run.folder, run.log, None, wandb_id=run.wandb_id, images=None, part="evaluation"
    )
    for board in boards:
        for name, result in results.items():
            prefix = f"evaluation/{name}" if name else "evaluation"
            figures = {f"{prefix}/{n}": result[n] for n in FIGURES if result[n] is not None}
            board.log({"images": run.images, **figures})
            board.show(run.images, f"{prefix}/samples", out / name / "grid.png")
        board.close()
