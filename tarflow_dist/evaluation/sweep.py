"""A sweep over the guidance weight: its table, and the curves."""

import csv
from pathlib import Path
from typing import Any

from tarflow_dist.files import write_whole

FIGURES = (
    "frechet_distance",
    "frechet_distance_error",
    "frechet_distance_bias",
    "spatial_frechet_distance",
    "inception_score",
    "inception_score_std",
    "precision",
    "recall",
    "kernel_distance",
    "kernel_distance_std",
)
COLUMNS = ("guidance", "denoise", *FIGURES, "num_samples", "redrawn_samples", "samples_sha256")


def write_csv(results: list[dict[str, Any]], file: Path) -> None:
    """A row a point; empty where a figure was not measured."""
    with write_whole(file) as part, part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Draws the figures that there are against the guidance weight into a PNG: a curve with and one
    without the denoising step, error bars of one standard error."""
    from matplotlib.figure import Figure

    distance = "FID" if results[0]["features"].startswith("inception") else "Fréchet distance"
    panels = [
        (distance, "frechet_distance", "frechet_distance_error"),
        ("Inception Score", "inception_score", "inception_score_std"),
        ("precision", "precision", None),
        ("recall", "recall", None),
    ]
    panels = [panel for panel in panels if results[0][panel[1]] is not None]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, name, spread) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for denoise in sorted({r["denoise"] for r in results}):
            points = sorted(
                (r for r in results if r["denoise"] == denoise), key=lambda r: r["guidance"]
            )
            axes.errorbar(
                [r["guidance"] for r in points],
                [r[name] for r in points],
                yerr=[r[spread] or 0 for r in points] if spread else None,
                label="denoised" if denoise else "not denoised",
                marker="o",
                markersize=4,
                capsize=3,
            )
        axes.set(xlabel="guidance w", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    with write_whole(file) as part:
        figure.savefig(part, dpi=120, format="png")
