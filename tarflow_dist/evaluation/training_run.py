"""A result on the dashboards of the training run that the model came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow_dist import config_file as configs
from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.metrics import FIGURES
from tarflow_dist.telemetry.dashboards import open_dashboards
from tarflow_dist.training import checkpoint, latest_checkpoint


@dataclass(frozen=True)
class TrainingRun:
    """Where a run logs, and the images it has seen."""

    folder: Path
    log: LogConfig
    wandb_id: str
    images: int


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


def log_to_run(run: TrainingRun, results: dict[Path, dict[str, Any]]) -> None:
    """Logs the figures and the grid of each result, by its folder, under evaluation/, against the
    images that the run has seen."""
    boards = open_dashboards(
        run.folder, run.log, None, wandb_id=run.wandb_id, images=None, part="evaluation"
    )
    for board in boards:
        for folder, result in results.items():
            prefix = "evaluation" if len(results) == 1 else f"evaluation/{folder.name}"
            figures = {f"{prefix}/{n}": result[n] for n in FIGURES if result[n] is not None}
            board.log({"images": run.images, **figures})
            board.show(run.images, f"{prefix}/samples", folder / "grid.png")
        board.close()
