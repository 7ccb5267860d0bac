"""The run's figures: one JSON line a logged step, and the same to Weights & Biases."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError
from tarflow_dist.files import write_whole

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to `run`/metrics.jsonl and logs them to wandb. Made on rank 0 alone.

    Args:
        run: the run's folder; wandb's own files go to `run`/wandb.
        log: where wandb's figures go.
        config: the resolved config, shown with the run at wandb.
        images: the run's position; rows past it belong to a future that was lost, and are dropped.
        wandb_id: id of the run to go on with; empty for a new one.
        rows_hash: what `sync` gave at that position; empty if it isn't known.

    Raises:
        UserError: wandb can't be reached, or there is no account for an online run.
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
        self._wandb = None
        self.wandb_id = wandb_id
        if log.wandb != "disabled":
            self._wandb = start_wandb(run, log, config, wandb_id)
            self.wandb_id = self._wandb.id

    def log(self, row: dict[str, float]) -> None:
        """Writes one row; it holds `images`, the position in the run. What is not finite, which
        JSON can't say, becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        line = json.dumps(finite) + "\n"
        self._hash.update(line)
        self._rows.write(line)
        self._rows.flush()
        self._tell_wandb(lambda run: run.log(row))

    def sync(self) -> str:
        """The rows are on disk when it returns; gives a hash of them."""
        os.fsync(self._rows.fileno())
        return self._hash.hexdigest()

    def log_picture(self, images: int, picture: Path) -> None:
        """Shows a PNG at wandb, as of `images` seen."""

        def log(run: Any) -> None:
            import wandb

            run.log({"images": images, "preview": wandb.Image(str(picture))})

        self._tell_wandb(log)

    def close(self) -> None:
        self._rows.close()
        self._tell_wandb(end_wandb)

    def _tell_wandb(self, action: Callable[[Any], None]) -> None:
        """Its trouble, of whatever kind, is no reason to end a run: it is told once."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._wandb = None
            said = f"{type(error).__name__}: {error}"
            print(f"Weights & Biases fails, and gets no more figures ({said})", file=sys.stderr)


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
    except (wandb.Error, OSError) as error:
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
    """The rows of a run's metrics.jsonl, up to one that can't be read; what was not finite is
    None."""
    rows, _ = _read(run / METRICS_FILE)
    return [row for _, row in rows]


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
