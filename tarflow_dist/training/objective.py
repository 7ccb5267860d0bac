"""The seam between a training run and what it trains for."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist.data.loader import Batch
from tarflow_dist.models.tarflow import TarFlow


class Objective(Protocol):
    """What a run minimises, and what it shows of it. What it has to keep are buffers of the flow,
    which are in every checkpoint. All but `begin_step`, `loss` and `draw` are collective."""

    def begin_step(self) -> None:
        """Forgets what was seen in the last step."""

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of this rank's images in one pass, to go backward from. What it saw is kept
        on the device for `figures`."""

    def culprit(self, loss: Tensor) -> str:
        """Where the numbers of a step first stopped being finite; `loss` is summed over passes."""

    def end_step(self, *, applied: bool) -> None:
        """The weights have been updated, or else the step was left out."""

    def figures(self) -> dict[str, float]:
        """Means over the global batch of the last step, "loss" among them."""

    def held_out_loss(self, flow: TarFlow, batches: Iterable[Batch]) -> float:
        """The loss of `flow` on all ranks' `batches`."""

    def draw(self, flow: TarFlow) -> NDArray[np.uint8]:
        """The samples of a preview: (B, H, W, C).

        Raises:
            ValueError: `flow` is too young to give any.
        """
