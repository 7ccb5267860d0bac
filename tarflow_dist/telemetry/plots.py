"""Pictures of a run."""

import math
from pathlib import Path

from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.metrics import read_metrics


def plot_loss(run: Path, out: Path) -> None:
    """Draws the training loss of `run` against images seen into the PNG `out`."""
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    losses = [math.nan if r["loss"] is None else r["loss"] for r in rows]
    axes.plot([r["images"] for r in rows], losses, linewidth=0.8)
    axes.set(xlabel="images seen", ylabel="loss (nats a dimension)", title=run.name)
    axes.grid(alpha=0.3)
    with write_whole(out) as part:
        figure.savefig(part, dpi=120, format="png")
