"""Where a run's figures and pictures are shown, against the images that it has seen."""

from pathlib import Path
from typing import Any, Protocol

from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError

TENSORBOARD = "tensorboard"
"""Folder of its event files, in the run's."""


class Dashboard(Protocol):
    name: str

    def log(self, row: dict[str, float]) -> None:
        """Figures by name, and "images", the position in the run."""

    def show(self, images: int, name: str, picture: Path) -> None:
        """A PNG, as of `images` seen."""

    def close(self) -> None:
        """Returns when all is written."""


def open_dashboards(
    run: Path,
    log: LogConfig,
    config: dict[str, Any] | None,
    *,
    wandb_id: str,
    images: int | None,
    part: str = "training",
) -> list[Dashboard]:
    """Those that `log` asks for.

    Args:
        run: the run's folder; their files go below it.
        config: the resolved config, shown with the run at wandb.
        wandb_id: id of the wandb run to go on with; empty for a new one.
        images: the run's position; what was shown past it belongs to a future that was lost. None
            if the run is not being trained.
        part: of the run, with a curve of its own where each writer needs one (TensorBoard).

    Raises:
        UserError: one is not installed or can't be reached, or has no account for us.
    """
    opened: list[Dashboard] = []
    writer = _tensorboard_writer() if log.tensorboard else None  # before a run begins at wandb
    if log.wandb != "disabled":
        opened.append(Wandb(run, log, config, wandb_id))
    if writer is not None:
        # its reader drops what earlier files have from there on
        purge = None if images is None else images + 1
        opened.append(TensorBoard(writer(str(run / TENSORBOARD / part), purge_step=purge)))
    return opened


def _tensorboard_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "log.tensorboard is set, but TensorBoard is not installed: pip install "
            "'tarflow_dist[tensorboard]', or set it to false"
        ) from error
    return SummaryWriter


class TensorBoard:
    """TensorBoard's event files, through torch's `SummaryWriter`."""

    name = "TensorBoard"

    def __init__(self, writer: Any):
        self._writer = writer

    def log(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "images":
                self._writer.add_scalar(name, value, int(row["images"]))
        self._writer.flush()

    def show(self, images: int, name: str, picture: Path) -> None:
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(picture).convert("RGB"))
        self._writer.add_image(name, pixels, images, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run."""

    name = "Weights & Biases"

    def __init__(self, run: Path, log: LogConfig, config: dict[str, Any] | None, wandb_id: str):
        import wandb

        try:
            self._run = wandb.init(
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
        self._run.define_metric("*", step_metric="images")
        self.id: str = self._run.id

    def log(self, row: dict[str, float]) -> None:
        self._run.log(row)

    def show(self, images: int, name: str, picture: Path) -> None:
        import wandb

        self._run.log({"images": images, name: wandb.Image(str(picture))})

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # its own process ends with this one
