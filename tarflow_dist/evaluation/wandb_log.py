"""A result at Weights & Biases, with the training run that the model came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow_dist import config_file as configs
from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.metrics import FIGURES
from tarflow_dist.telemetry.metrics import end_wandb, start_wandb
from tarflow_dist.training import checkpoint, pointer


@dataclass(frozen=True)
class TrainingRun:
    """Where a run logs, and the images it has seen."""

    folder: Path
    log: LogConfig
    wandb_id: str
    images: int


def find_training_run(folder: Path, provenance: dict[str, Any]) -> TrainingRun:
    """The run that trained a model of this `provenance`, if it logs to Weights & Biases.

    Raises:
        UserError: it doesn't, or has no checkpoint yet.
    """
    log = configs.load_saved(folder)[0].log
    if log.wandb == "disabled":
        raise UserError(f"--wandb {folder}: this run was trained with log.wandb=disabled")
    newest = pointer.newest(folder / pointer.FOLDER)
    if newest is None:
        raise UserError(f"--wandb {folder}: this run has no checkpoint yet")
    state = checkpoint.Checkpoint(newest).state
    return TrainingRun(folder, log, state.wandb_id, provenance.get("images", state.images))


def log_to_run(run: TrainingRun, results: dict[Path, dict[str, Any]]) -> None:
    """Logs the figures and the grid of each result, by its folder, under evaluation/, against the
    images that the run has seen."""
    import wandb

    started = start_wandb(run.folder, run.log, None, run.wandb_id)
    for folder, result in results.items():
        prefix = "evaluation" if len(results) == 1 else f"evaluation/{folder.name}"
        figures = {f"{prefix}/{name}": result[name] for name in FIGURES if result[name] is not None}
        grid = {f"{prefix}/samples": wandb.Image(str(folder / "grid.png"))}
        started.log({"images": run.images, **figures, **grid})
    end_wandb(started)
