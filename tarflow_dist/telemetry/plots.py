"""Pictures of a run."""

from pathlib import Path

from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.metrics import read_metrics


def plot_loss(run: Path, out: Path) -> None:
    """Draws the training loss of `run` against images seen into the PNG `out`."""
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["images"] for r in rows], [r["loss"] for r in rows], linewidth=0.8)
    axes.set(xlabel="images seen", ylabel="loss (nats a dimension)", title=run.name)
    axes.grid(alpha=0.3)
    with write_whole(out) as part:
        figure.savefig(part, dpi=120, format="png")
