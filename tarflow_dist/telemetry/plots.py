"""Pictures of a run."""

import math
from pathlib import Path

from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.metrics_log import read_metrics


def plot_loss(run: Path, out: Path) -> None:
    """Draws the loss of `run` against images seen into the PNG `out`: while training and, where it
    was measured, on held-out images."""
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "held out", ".-")):
        shown = [(r["images"], math.nan if r[key] is None else r[key]) for r in rows if key in r]
        if shown:
            axes.plot(*zip(*shown, strict=True), style, linewidth=0.8, label=label)
    if axes.lines:
        axes.legend()
    axes.set(xlabel="images seen", ylabel="loss (nats a dimension)", title=run.name)
    axes.grid(alpha=0.3)
    with write_whole(out) as part:
        figure.savefig(part, dpi=120, format="png")
