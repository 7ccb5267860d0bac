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
from tarflow_dist.flow.kv_cache import cached_transformer
from tarflow_dist.flow.transformer import accurate_dtype

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
) -> Tensor:
    """Latent to data through one block.

    Each sample has a window of its own; the others of its batch change nothing but the rounding of
    batch shapes.

    Args:
        z: (B, N, D) in image order, at least float32.
        y: (B,) int64 class ids, −1 for none; None for no label at all.
        sigma: (B,) noise levels, where they are a condition.

    Returns:
        x (B, N, D) in image order.
    """
    if len(z) == 0:
        return z
    z = block.permute(z)
    predict = Predictor(block, y, len(z), guidance, sigma)
    one_by_one = solver.window == 1 and not has_graphs(z.device)
    x = _in_sequence(predict, z) if one_by_one else _in_windows(predict, z, solver)
    return block.permute(x)


def _in_sequence(predict: "Predictor", z: Tensor) -> Tensor:
    x = z.clone()
    for i in range(z.shape[1] - 1):
        mu, scale = predict(x[:, i : i + 1], i, i + 1)
        torch.addcmul(mu, z[:, i + 1 : i + 2], scale, out=x[:, i + 1 : i + 2])
    return x


def _in_windows(predict: "Predictor", z: Tensor, solver: Solver) -> Tensor:
    """The first guess is z itself. Solved samples leave the sweeps once they are half of them."""
    last = z.shape[1] - 1
    window = torch.arange(min(solver.window, last), device=z.device)
    sweeps_between_checks = 1 if z.device.type == "cpu" else SWEEPS_BETWEEN_CHECKS
    if len(window) == 1:  # each sweep settles one patch of each sample
        sweeps_between_checks = last
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
        x, z, samples, settled = x[going], z[going], samples[going], settled[going]
        predict.keep(going)


def _sweep(
    predict: "Predictor",
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


class Predictor:
    """μ and exp(α) of a block, guided, for patches whose predecessors it has been given before.

    The conditional and the unguided pass run as one batch of 2B.
    """

    def __init__(
        self,
        block: FlowBlock,
        y: Tensor | None,
        batch: int,
        guidance: Guidance,
        sigma: Tensor | None = None,
    ):
        self._block, self._guidance = block, guidance
        temperature: Tensor | None = None
        rows = batch
        if guidance.active:
            rows = 2 * batch
            y = None if y is None else torch.cat([y, torch.full_like(y, -1)])
            sigma = None if sigma is None else torch.cat([sigma, sigma])
            if guidance.attn_temp != 1:
                weight = block.proj_out.weight
                temperature = weight.new_ones(rows, 1, 1, 1, dtype=accurate_dtype(weight.dtype))
                temperature[batch:] = guidance.attn_temp
        self._transformer = cached_transformer(block, block.condition(y, sigma), rows, temperature)

    def __call__(self, x: Tensor, at: int | Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """The patches x (B, S, D) → μ and exp(α) (B, S, D) of those that come after each.

        Their keys and values are kept, for calls with later patches.

        Args:
            at: where they stand in the sequence: the place of a single patch (S = 1), or (B, S),
                each sample's own, never descending.
            stop: above all of `at`.
        """
        places = at
        if self._guidance.active:
            x = torch.cat([x, x])
            if isinstance(at, Tensor):
                places = torch.cat([at, at])
        mu, alpha = self._block.mu_alpha(self._transformer(x, places, stop))
        if not self._guidance.active:
            return mu, alpha.exp()
        return self._guidance.combine(mu, alpha, at + 1, len(self._block.pos_embed))

    def keep(self, samples: Tensor) -> None:
        """Goes on with some of the samples: (B,) bool."""
        self._transformer.keep(torch.cat([samples, samples]) if self._guidance.active else samples)
