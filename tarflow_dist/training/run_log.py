"""What a run writes down: metrics, progress, status. Rank 0 writes; all ranks call."""

import time
from pathlib import Path

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.telemetry.metrics_log import Metrics, plot_loss
from tarflow_dist.telemetry.progress import Progress
from tarflow_dist.telemetry.throughput import Throughput
from tarflow_dist.training import run_folder
from tarflow_dist.training.checkpoint import RunState


class RunLog:
    """Context manager around the steps of a run.

    Args:
        config: the run's.
        state: read at every row; gets the run's wandb id.
        changes: sentences on what differs from the run's last start.
        throughput: measures the run's speed.
    """

    def __init__(self, config: Config, state: RunState, changes: list[str], throughput: Throughput):
        self._config, self._state, self._throughput = config, state, throughput
        self._figures: dict[str, float] = {}
        self._speed = 0.0  # images a second of late; 0 where not known yet
        self._progress = Progress(
            config.run.name,
            config.train.images,
            start=state.images,
            enabled=distributed.is_main(),
        )
        self._metrics: Metrics | None = None
        if distributed.is_main():
            self._metrics = Metrics(
                config.run,
                config.log,
                config.model_dump(mode="json"),
                images=state.images,
                wandb_id=state.wandb_id,
                rows_hash=state.rows_hash,
            )
            run_folder.record_start(config, state.images)
            state.wandb_id = self._metrics.wandb_id
            verb = f"going on at {state.images} images" if state.images else "starting"
            self._say("; ".join([verb, *changes]))
            self.record_status()

    def write_row(self, figures: dict[str, float], *, stall_seconds: float) -> None:
        """A row of metrics for the step just taken, with the run's speed since the last row.
        Collective.

        Args:
            figures: the step's.
            stall_seconds: time that checkpoints have held up training so far.
        """
        speed = self._throughput.figures(self._state.images)
        self._figures["loss"] = figures["loss"]
        self._speed = speed["images_per_second"]
        if self._metrics is not None:
            row = {"images": self._state.images, **figures, **speed}
            row |= {"skipped": self._state.skipped, "checkpoint_stall_seconds": stall_seconds}
            self._metrics.log(row)

    def write_val_loss(self, loss: float, *, seconds: float) -> None:
        """A row with the held-out loss, which took `seconds` to measure."""
        self._figures["val_loss"] = loss
        if self._metrics is not None:
            row = {"images": self._state.images, "val_loss": loss, "val_seconds": seconds}
            self._metrics.log(row)

    def show_preview(self, drawn: Path | str) -> None:
        """A grid of samples, or why there is none."""
        if self._metrics is None:
            return
        if isinstance(drawn, Path):
            self._metrics.log_picture(self._state.images, drawn)
        else:
            self._say(f"no preview: {drawn}")

    def advance(self, images: int) -> None:
        """A step of `images` is done."""
        self._progress.update(images, self._figures)

    def sync(self) -> None:
        """The rows so far are on disk when it returns: none may be missing before a checkpoint,
        whose state has their hash."""
        if self._metrics is not None:
            self._state.rows_hash = self._metrics.sync()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        if self._metrics is None:
            return
        self._metrics.close()
        finished = self._state.images >= self._config.train.images
        state = "failed" if any(exception) else "finished" if finished else "interrupted"
        self.record_status(state, str(exception[1]) if any(exception) else None)
        try:
            plot_loss(self._config.run, self._config.run / "loss.png")
        except OSError as error:
            self._say(f"no loss.png ({error.strerror})")

    def record_status(self, state: str = "running", error: str | None = None) -> None:
        """Notes in status.json how far the run is."""
        if self._metrics is None:
            return
        images, total, speed = self._state.images, self._config.train.images, self._speed
        status = {
            "state": state,
            "images": images,
            "total_images": total,
            "images_per_second": speed,
            "eta_seconds": max(total - images, 0) / speed if speed else None,
            "updated": time.time(),
            "error": error,
        }
        try:
            run_folder.write_status(self._config.run, status)
        except OSError as problem:
            self._say(f"status.json can't be written ({problem.strerror})")

    def _say(self, what: str) -> None:
        distributed.say(f"{self._config.run}: {what}")
