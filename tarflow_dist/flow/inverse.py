"""Inverting a flow block: x_i = z_i · exp(α_i(x_<i)) + μ_i(x_<i), window after window of patches.

A window of one patch is the sequential inverse. In a longer window all patches are swept together,
x ← z · exp(α(x)) + μ(x), with the keys and values of the patches before it frozen (Jacobi's
iteration). Sweep k leaves the first k patches exact, so that a window's length bounds its sweeps.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.transformer import TransformerLayer, accurate_dtype

Start = Literal["latent", "zero", "previous"]
SWEEPS_BETWEEN_CHECKS = 3
"""On a GPU, where a check waits for all that is queued; a sweep too many changes no sample."""
WILD = 1e6
"""A guess further from 0 than this goes back to its latent value; answers stay as they are."""


@dataclass(frozen=True)
class Solver:
    """How one block is inverted.

    Attributes:
        window: patches solved together; 1 is the sequential inverse, exact.
        tolerance: a sample's window is solved when a sweep changes none of its values by this much.
        start: the first guess of a window: its latent values, zeros, or the patch before it.
    """

    window: int = 1
    tolerance: float = 0.0
    start: Start = "latent"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window is {self.window!r}, but must be a whole number, 1 or more")
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance is {self.tolerance!r}, but must be a number, 0 or more")
        if self.start not in get_args(Start):
            raise ValueError(f"start is {self.start!r}, but must be {', '.join(get_args(Start))}")


SEQUENTIAL = Solver()


@torch.no_grad()
def invert_block(
    block: FlowBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    solver: Solver = SEQUENTIAL,
) -> Tensor:
    """Latent to data through one block.

    When a sample is solved is decided by itself alone; the others of its batch change nothing but
    the rounding of batch shapes.

    Args:
        z: (B, N, D) in image order, at least float32.
        y: (B,) int64 class ids, −1 for none; None for no label at all.

    Returns:
        x (B, N, D) in image order.
    """
    z = block.permute(z)
    x = z.clone()
    predict = Predictor(block, y, len(z), guidance)
    last = z.shape[1] - 1
    for start in range(0, last, solver.window):
        _solve_window(predict, x, z, start, min(start + solver.window, last), solver)
    return block.permute(x)


class Predictor:
    """μ and α of a block, guided, for any patches that follow those it has been given before.

    The conditional and the unguided pass run as one batch of 2B.
    """

    def __init__(self, block: FlowBlock, y: Tensor | None, batch: int, guidance: Guidance):
        self._block, self._guidance = block, guidance
        self._positions = block.permuted_positions()
        self._num_patches = len(self._positions)
        self._temperature: Tensor | None = None
        rows = batch
        if guidance.active:
            rows = 2 * batch
            if y is not None:
                y = torch.cat([y, torch.full_like(y, -1)])
            if guidance.attn_temp != 1:
                dtype = accurate_dtype(self._positions.dtype)
                self._temperature = self._positions.new_ones(rows, 1, 1, 1, dtype=dtype)
                self._temperature[batch:] = guidance.attn_temp
        self._class_vector = block.class_vector(y)
        self._caches = block.new_caches(rows)
        self._lower_triangle: Tensor | None = None

    def __call__(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The S patches (B, S, D) from `start` → μ and α (B, S, D) of the patches from start + 1.

        Their keys and values are kept; those of later patches, from calls before, are not read.
        """
        stop = start + x.shape[1]
        mask = self._mask()[start:stop, :stop] if stop - start > 1 else None
        if self._guidance.active:
            x = torch.cat([x, x])
        h = self._block.embed(x, self._positions[start:stop], self._class_vector)
        for layer, cache in zip(self._block.attn_blocks, self._caches, strict=True):
            assert isinstance(layer, TransformerLayer)
            h = layer.extend(h, cache, start, mask, self._temperature)
        mu, alpha = self._block.mu_alpha(h)
        if self._guidance.active:
            mu, alpha = self._guidance.combine(mu, alpha, start + 1, self._num_patches)
        return mu, alpha

    def _mask(self) -> Tensor:
        if self._lower_triangle is None:
            shape = (self._num_patches, self._num_patches)
            ones = torch.ones(shape, dtype=torch.bool, device=self._positions.device)
            self._lower_triangle = ones.tril()
        return self._lower_triangle


def _solve_window(
    predict: Predictor, x: Tensor, z: Tensor, first: int, last: int, solver: Solver
) -> None:
    """Works out the patches first + 1 … last of x (B, N, D), in place; x holds those up to `first`.

    Sweep k takes the patches from first + k, because those before are exact and so are their keys
    and values. A solved sample keeps its inputs, whatever the others still need.
    """
    inputs = torch.cat([x[:, first : first + 1], _first_guess(x, z, first, last, solver)], dim=1)
    solved = torch.zeros(len(x), 1, 1, dtype=torch.bool, device=x.device)
    checks = 1 if x.device.type == "cpu" else SWEEPS_BETWEEN_CHECKS
    for k in range(last - first):
        latent = z[:, first + 1 + k : last + 1]
        mu, alpha = predict(inputs[:, k:], first + k)
        new = torch.addcmul(mu, latent, alpha.exp())
        x[:, first + 1 + k : last + 1] = new
        if first + k + 1 == last:
            return
        new, old = new[:, :-1], inputs[:, k + 1 :]
        solved |= (new - old).abs().amax(dim=(1, 2), keepdim=True) < solver.tolerance
        # a guess that overflows would reach the patches before it, masked or not, as 0 · inf
        guess = torch.where(new.abs() < WILD, new, latent[:, :-1])
        guess[:, 0] = new[:, 0]  # no guess: exact
        inputs[:, k + 1 :] = torch.where(solved, old, guess)
        if k % checks == checks - 1 and bool(solved.all()):
            return


def _first_guess(x: Tensor, z: Tensor, first: int, last: int, solver: Solver) -> Tensor:
    """Of the patches first + 1 … last − 1."""
    latent = z[:, first + 1 : last]
    if solver.start == "zero":
        return torch.zeros_like(latent)
    return x[:, first : first + 1].expand_as(latent) if solver.start == "previous" else latent
