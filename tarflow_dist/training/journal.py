"""What a run writes down: metrics, progress, status. Rank 0 writes; all ranks call."""

import sys
import time

from tarflow_dist import distributed
from tarflow_dist.config import Config
from tarflow_dist.telemetry.metrics import Metrics
from tarflow_dist.telemetry.plots import plot_loss
from tarflow_dist.telemetry.progress import Progress
from tarflow_dist.training import run_folder
from tarflow_dist.training.state import RunState
from tarflow_dist.training.step import StepResult


class Journal:
    """Context manager around the steps of a run.

    Args:
        config: the run's.
        state: read at every row; gets the run's wandb id.
        changes: sentences on what differs from the run's last start.
    """

    def __init__(self, config: Config, state: RunState, changes: list[str]):
        self._config, self._state = config, state
        self._figures: dict[str, float] = {}
        self._progress = Progress(
            config.run.name,
            config.train.images,
            start=state.images,
            enabled=distributed.is_main(),
        )
        self._metrics: Metrics | None = None
        if distributed.is_main():
            run_folder.record_start(config)
            self._metrics = Metrics(
                config.run,
                config.log,
                config.model_dump(mode="json"),
                images=state.images,
                wandb_id=state.wandb_id,
            )
            state.wandb_id = self._metrics.wandb_id
            verb = f"going on at {state.images} images" if state.images else "starting"
            print(f"{config.run}: {verb}", *changes, sep="; ", file=sys.stderr)
            self.record_progress()
        self._row_time, self._row_images = time.monotonic(), state.images

    def write_row(self, step: StepResult) -> None:
        """A row of metrics for the step just taken. Collective."""
        figures = step.figures()
        now, images = time.monotonic(), self._state.images
        rate = (images - self._row_images) / (now - self._row_time)
        self._row_time, self._row_images = now, images
        self._figures = {"loss": figures["loss"]}
        if self._metrics is not None:
            self._metrics.log({"images": images, **figures, "images_per_second": rate})

    def advance(self, images: int) -> None:
        """A step of `images` is done."""
        self._progress.update(images, self._figures)

    def record_progress(self) -> None:
        """Notes in status.json how far the run is."""
        if self._metrics is not None:
            run_folder.record_status(self._config, state="running", images=self._state.images)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        if self._metrics is None:
            return
        self._metrics.close()
        plot_loss(self._config.run, self._config.run / "loss.png")
        images = self._state.images
        finished = images >= self._config.train.images
        state = "failed" if any(exception) else "finished" if finished else "interrupted"
        run_folder.record_status(self._config, state=state, images=images)
