"""The run's figures: one JSON line a logged step, and the same to Weights & Biases."""

import json
import math
from pathlib import Path
from typing import Any

from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError
from tarflow_dist.files import write_whole


class Metrics:
    """Appends rows to `run`/metrics.jsonl and logs them to wandb. Made on rank 0 alone.

    Args:
        run: the run's folder; wandb's own files go to `run`/wandb.
        log: where wandb's figures go.
        config: the resolved config, shown with the run at wandb.
        images: the run's position; rows past it belong to a future that was lost, and are dropped.
        wandb_id: id of the run to go on with; empty for a new one.

    Raises:
        UserError: wandb can't be reached, or there is no account for an online run.
    """

    def __init__(
        self, run: Path, log: LogConfig, config: dict[str, Any], *, images: int, wandb_id: str
    ):
        self.file = run / "metrics.jsonl"
        if self.file.exists():
            lines = _whole_lines(self.file)
            kept = [line for line in lines if json.loads(line)["images"] <= images]
            with write_whole(self.file) as part:
                part.write_text("".join(kept))
        self._rows = self.file.open("a")
        self._wandb = None
        self.wandb_id = wandb_id
        if log.wandb != "disabled":
            self._wandb = start_wandb(run, log, config, wandb_id)
            self.wandb_id = self._wandb.id

    def log(self, row: dict[str, float]) -> None:
        """Writes one row; it holds `images`, the position in the run. What is not finite, which
        JSON can't say, becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._rows.write(json.dumps(finite) + "\n")
        self._rows.flush()
        if self._wandb is not None:
            self._wandb.log(row)

    def log_picture(self, images: int, picture: Path) -> None:
        """Shows a PNG at wandb, as of `images` seen."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({"images": images, "preview": wandb.Image(str(picture))})

    def close(self) -> None:
        self._rows.close()
        if self._wandb is not None:
            end_wandb(self._wandb)


def start_wandb(run: Path, log: LogConfig, config: dict[str, Any] | None, wandb_id: str) -> Any:
    """A wandb run whose figures stand against "images". Arguments as for `Metrics`.

    Raises:
        UserError: wandb can't be reached, or there is no account for an online run.
    """
    import wandb

    try:
        started = wandb.init(
            project=log.wandb_project,
            name=run.name,
            id=wandb_id or None,
            resume="allow",
            dir=run,
            mode=log.wandb,
            config=config,
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases refuses the run ({error}): log in with `wandb login`, or "
            "set log.wandb=offline"
        ) from error
    # its own step counter would refuse the rows that a resumed run writes once more
    started.define_metric("*", step_metric="images")
    return started


def end_wandb(started: Any) -> None:
    """Ends a wandb run when all of it is written: its own process ends with this one."""
    import wandb

    started.finish()
    wandb.teardown()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl; what was not finite is None."""
    return [json.loads(line) for line in _whole_lines(run / "metrics.jsonl")]


def _whole_lines(file: Path) -> list[str]:
    """The lines that were written to their end; a killed run may leave half of one."""
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
