"""A sweep over the guidance weight, and over the steps of denoising: its table, and the curves."""

import csv
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from tarflow_dist.evaluation.metrics import FIGURES, METRICS
from tarflow_dist.evaluation.result import denoising, figures
from tarflow_dist.files import write_whole

COLUMNS = (
    *("guidance", "denoise", "denoise_steps", *FIGURES),
    *("num_samples", "redrawn_samples", "samples_sha256"),
)
PLOTTED = ("frechet_distance", "inception_score", "precision", "recall")


def write_csv(results: list[dict[str, Any]], file: Path) -> None:
    """A row a point; empty where a figure was not measured."""
    with write_whole(file) as part, part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def show(results: list[dict[str, Any]], best: int) -> None:
    """Prints the table, `results[best]` marked."""
    header = ["guidance", "denoising", *figures(results[0])]
    rows = [[f"{r['guidance']:g}", denoising(r), *figures(r).values()] for r in results]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for place, row in enumerate([header, *rows], -1):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print((cells + ("  best" if place == best else "")).rstrip())


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Draws the figures that there are into a PNG, with error bars of one standard error: against
    the guidance weight, a curve for each way of denoising; or at one weight against the steps."""
    from matplotlib.figure import Figure

    panels = [m for m in METRICS if m.name in PLOTTED and results[0][m.name] is not None]
    by_steps = len({r["guidance"] for r in results}) == 1
    by_steps = by_steps and len({r.get("denoise_steps") for r in results if r["denoise"]}) > 1
    curves: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
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
