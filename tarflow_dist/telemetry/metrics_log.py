"""The run's figures: one JSON line a logged step, and the same on dashboards."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from tarflow_dist.config import LogConfig
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.dashboards import Dashboard, Wandb, open_dashboards

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to `run`/metrics.jsonl and shows them on dashboards. Made on rank 0 alone.

    Args:
        run: the run's folder; wandb's own files go to `run`/wandb.
        log: which dashboards there are.
        config: the resolved config, shown with the run at wandb.
        images: the run's position; rows past it belong to a future that was lost, and are dropped.
        wandb_id: id of the run to go on with; empty for a new one.
        rows_hash: what `sync` gave at that position; empty if it isn't known.

    Raises:
        UserError: a dashboard is not installed or can't be reached, or has no account for us;
            nothing was written.
    """

    def __init__(
        self,
        run: Path,
        log: LogConfig,
        config: dict[str, Any],
        *,
        images: int,
        wandb_id: str,
        rows_hash: str = "",
    ):
        self._dashboards = open_dashboards(run, log, config, wandb_id=wandb_id, images=images)
        self.wandb_id = next((d.id for d in self._dashboards if isinstance(d, Wandb)), wandb_id)
        self.file = run / METRICS_FILE
        self._hash = xxhash.xxh3_128()
        rows, damaged = _read(self.file) if self.file.exists() else ([], None)
        if damaged:
            print(f"{self.file}: {damaged}; it and the rows after it are dropped", file=sys.stderr)
        kept = "".join(line for line, row in rows if row["images"] <= images)
        self._hash.update(kept)
        if rows_hash and self._hash.hexdigest() != rows_hash:
            print(
                f"{self.file}: rows up to {images} images were changed or lost since they were "
                "written",
                file=sys.stderr,
            )
        with write_whole(self.file) as part:
            part.write_text(kept)
        self._rows = self.file.open("a")

    def log(self, row: dict[str, float]) -> None:
        """Writes one row; it holds `images`, the position in the run. What is not finite, which
        JSON can't say, becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        line = json.dumps(finite) + "\n"
        self._hash.update(line)
        self._rows.write(line)
        self._rows.flush()
        self._tell(lambda dashboard: dashboard.log(row))

    def sync(self) -> str:
        """The rows are on disk when it returns; gives a hash of them."""
        os.fsync(self._rows.fileno())
        return self._hash.hexdigest()

    def log_picture(self, images: int, picture: Path) -> None:
        """Shows a PNG on the dashboards, as of `images` seen."""
        self._tell(lambda dashboard: dashboard.show(images, "preview", picture))

    def close(self) -> None:
        self._rows.close()
        self._tell(lambda dashboard: dashboard.close())

    def _tell(self, action: Callable[[Dashboard], None]) -> None:
        """Their trouble, of whatever kind, is no reason to end a run: it is told once."""
        for dashboard in list(self._dashboards):
            try:
                action(dashboard)
            except Exception as error:
                self._dashboards.remove(dashboard)
                said = f"{type(error).__name__}: {error}"
                print(f"{dashboard.name} fails, and gets no more figures ({said})", file=sys.stderr)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, up to one that can't be read; what was not finite is
    None."""
    rows, _ = _read(run / METRICS_FILE)
    return [row for _, row in rows]


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


def _read(file: Path) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    """The lines of `file` with the rows that they are, up to one that is none; and in words which
    that is. A last line without an end is what a killed run leaves, and nothing to tell."""
    rows: list[tuple[str, dict[str, Any]]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n") and not line.startswith(b"\0"):
                break
            try:
                row = json.loads(text := line.decode())
                if not isinstance(row["images"], int):
                    raise TypeError
                if not all(isinstance(value, int | float | None) for value in row.values()):
                    raise TypeError
            except (ValueError, TypeError, LookupError, RecursionError):
                return rows, f"line {number} can't be read"
            rows.append((text, row))
    return rows, None
