"""Inverting a flow block: x_i = z_i · exp(α_i(x_<i)) + μ_i(x_<i), patch by patch or in windows.

In a window the next patches are swept together, x ← z · exp(α(x)) + μ(x), with the keys and values
of the patches before it kept (Jacobi's iteration). A sweep settles the first patch of its window,
and each further one whose predecessors it left as they were; the window then slides on to the first
that is not settled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.cuda_graphs import Replay, has_graphs
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.predictor import Predictor, guided_condition
from tarflow_dist.flow.recordings import Recordings

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


@torch.no_grad()
def invert_block(
    block: FlowBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    solver: Solver = SEQUENTIAL,
    sigma: Tensor | None = None,
    recordings: Recordings | None = None,
) -> Tensor:
    """Latent to data through one block.

    Each sample has a window of its own; the others of its batch change nothing but the rounding of
    batch shapes.

    Args:
        z: (B, N, D) in image order, at least float32.
        y: (B,) int64 class ids, −1 for none; None for no label at all.
        sigma: (B,) noise levels, where they are a condition.
        recordings: where a GPU keeps what it has recorded of the sequential inverse, for the next
            call; None leaves it to record anew.

    Returns:
        x (B, N, D) in image order.
    """
    if len(z) == 0:
        return z
    z = block.permute(z)
    condition = guided_condition(block, y, sigma, guidance)
    if solver.window == 1 and has_graphs(z.device):
        x = (recordings or Recordings()).invert(block, z, condition, guidance)
    else:
        predict = Predictor(block, condition, len(z), guidance)
        x = _in_sequence(predict, z) if solver.window == 1 else _in_windows(predict, z, solver)
    return block.permute(x)


def _in_sequence(predict: Predictor, z: Tensor) -> Tensor:
    x = z.clone()
    for i in range(z.shape[1] - 1):
        mu, scale = predict(x[:, i : i + 1], i, i + 1)
        torch.addcmul(mu, z[:, i + 1 : i + 2], scale, out=x[:, i + 1 : i + 2])
    return x


def _in_windows(predict: Predictor, z: Tensor, solver: Solver) -> Tensor:
    """The first guess is z itself. Solved samples leave the sweeps once they are half of them."""
    last = z.shape[1] - 1
    window = torch.arange(min(solver.window, last), device=z.device)
    sweeps_between_checks = 1 if z.device.type == "cpu" else SWEEPS_BETWEEN_CHECKS
    solved, x = z.clone(), z.clone()
    samples = torch.arange(len(z), device=z.device)
    settled = torch.zeros_like(samples)  # each sample's last such patch
    while True:
        sweep: Callable[[int], None] = partial(
            _sweep, predict, x, z, settled, window, solver.tolerance
        )
        if has_graphs(z.device):
            sweep = Replay(sweep, (x, settled), z.shape[1])
        going = settled < last
        while 2 * int(going.sum()) > len(going):
            furthest = int(settled.max())  # of what is settled, or later
            for _ in range(sweeps_between_checks):
                furthest += len(window)
                sweep(min(furthest, last))
            going = settled < last
        solved[samples[~going]] = x[~going]
        if not going.any():
            return solved
        kept = _half(going) if has_graphs(z.device) else going
        x, z, samples, settled = x[kept], z[kept], samples[kept], settled[kept]
        predict.keep(kept)


def _half(going: Tensor) -> Tensor:
    """Half of the samples, (B,) bool, with all that go on. A GPU has plans and graphs for each size
    of batch, so that it should meet few."""
    kept = torch.zeros_like(going)
    kept[going.int().argsort(descending=True, stable=True)[: len(going) // 2]] = True
    return kept


def _sweep(
    predict: Predictor,
    x: Tensor,
    z: Tensor,
    settled: Tensor,
    window: Tensor,
    tolerance: float,
    stop: int,
) -> None:
    """Updates x (B, N, D) by one sweep over each sample's window, and settled (B,)."""
    last = x.shape[1] - 1
    going = settled < last
    at = (settled[:, None] + window).clamp(max=last - 1)  # at the end, the last patch repeatedly
    sample = torch.arange(len(x), device=x.device)[:, None]
    mu, scale = predict(x[sample, at], at, stop)
    old, latent = x[sample, at + 1], z[sample, at + 1]
    new = torch.addcmul(mu, latent, scale)
    kept = ((new - old).abs().amax(dim=2) < tolerance)[:, :-1] | (at[:, 1:] == at[:, :-1])
    settles = torch.cat([torch.ones_like(going)[:, None], kept], dim=1).cumprod(dim=1)
    # a guess that overflows would reach the patches before it, masked or not, as 0 · inf
    use = settles.bool()[..., None] | (new.abs() < DIVERGED)
    x[sample, at + 1] = torch.where(going[:, None, None], torch.where(use, new, latent), old)
    settled.copy_((settled + settles.sum(dim=1)).clamp(max=last))
