"""The seam between a training run and what it trains for."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist.data.loader import Batch
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.training.checkpoint import Piece, Read


class Objective(Protocol):
    """What a run minimises, and what it shows and keeps of it. All but `loss`, `draw`, `pieces` and
    `load` are collective."""

    def begin_step(self) -> None:
        """Forgets what was seen in the last step."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of this rank's images in one pass, to go backward from. What it saw is kept
        on the device for `figures`."""
        ...

    def culprit(self, loss: Tensor) -> str:
        """Where the numbers of a step first stopped being finite; `loss` is summed over passes."""
        ...

    def end_step(self, *, applied: bool) -> None:
        """The weights have been updated, or else the step was left out."""
        ...

    def pieces(self) -> Iterable[Piece]:
        """This rank's share of what belongs to it in a checkpoint, beside the weights."""
        ...

    def load(self, read: Read) -> None:
        """Takes over the same, of which `read` gives parts."""
        ...

    def figures(self) -> dict[str, float]:
        """Means over the global batch of the last step, "loss" among them."""
        ...

    def held_out_loss(self, flow: TarFlow, batches: Iterable[Batch]) -> float:
        """The loss of `flow` on all ranks' `batches`."""
        ...

    def draw(self, flow: TarFlow, index: Tensor, count: int) -> NDArray[np.uint8]:
        """The samples `index` (B,) of a preview of `count`: (B, H, W, C).

        Raises:
            ValueError: `flow` is too young to give any.
        """
        ...
