"""Inverting a flow block in windows, by Jacobi's iteration.

The next patches of a sequence are swept together, x ← z · exp(α(x)) + μ(x), with the keys and
values of the patches before them kept. A sweep settles the first patch of its window, and each
further one whose predecessors it left as they were; the window then slides on to the first that is
not settled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_dist.flow.predictor import Predictor

SWEEPS_BETWEEN_CHECKS = 3
"""On a GPU, where a check waits for all that is queued."""
DIVERGED = 1e6
"""A guess further from 0 than this goes back to its latent value; answers stay as they are."""


@dataclass(frozen=True)
class Solver:
    """How one block is inverted.

    Attributes:
        window: patches swept together; 1 is the sequential inverse, exact.
        tolerance: a patch is settled when its predecessors are and a sweep changed none of their
            values by this much.
    """

    window: int = 1
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window is {self.window!r}, but must be a whole number, 1 or more")
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance is {self.tolerance!r}, but must be a number, 0 or more")


SEQUENTIAL = Solver()


class Windows:
    """The sweeps over a batch. Each sample has a window of its own.

    Args:
        predict: the block's predictor, which has seen nothing yet.
        z: latents (B, N, D) in the block's own order.
        x: like z: the guess that is swept, and the answer.
    """

    def __init__(self, predict: Predictor, z: Tensor, x: Tensor, solver: Solver):
        self._predict, self._z, self._tolerance = predict, z, solver.tolerance
        self._last = z.shape[1] - 1
        self.x = x
        self.settled = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        """Each sample's last such patch."""
        self._window = torch.arange(min(solver.window, self._last), device=z.device)
        self._sample = torch.arange(len(z), device=z.device)[:, None]

    def solve(self, sweep: Callable[[int], None]) -> None:
        """From the first guess, z itself, to the answer, by calls of `sweep` or what replays it."""
        self.x.copy_(self._z)
        self.settled.zero_()
        sweeps_between_checks = 1 if self.x.device.type == "cpu" else SWEEPS_BETWEEN_CHECKS
        while True:
            least, furthest = torch.stack(self.settled.aminmax()).tolist()
            if least == self._last:
                return
            for _ in range(sweeps_between_checks):
                furthest = min(furthest + len(self._window), self._last)
                sweep(furthest)

    def sweep(self, stop: int) -> None:
        """One sweep over each sample's window; all of them end before patch `stop`."""
        x, z, settled, last = self.x, self._z, self.settled, self._last
        going = settled < last
        at = (settled[:, None] + self._window).clamp(
            max=last - 1
        )  # at the end, the last repeatedly
        mu, scale = self._predict(x[self._sample, at], at, stop)
        old, latent = x[self._sample, at + 1], z[self._sample, at + 1]
        new = torch.addcmul(mu, latent, scale)
        kept = ((new - old).abs().amax(dim=2) < self._tolerance)[:, :-1] | (at[:, 1:] == at[:, :-1])
        settles = torch.cat([torch.ones_like(going)[:, None], kept], dim=1).cumprod(dim=1)
        # a guess that overflows would reach the patches before it, masked or not, as 0 · inf
        use = settles.bool()[..., None] | (new.abs() < DIVERGED)
        x[self._sample, at + 1] = torch.where(
            going[:, None, None], torch.where(use, new, latent), old
        )
        settled.copy_((settled + settles.sum(dim=1)).clamp(max=last))
