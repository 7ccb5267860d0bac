"""The figures of a training step: what its passes over the batch saw, as means over all ranks, and
where its numbers stopped being finite."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_dist import distributed
from tarflow_dist.flow.bits_per_dim import bits_per_dim, log_prob_of
from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.model import Flow

BANDS = 4


class StepMetrics:
    """Sums over a step's passes, kept on the device: nothing is awaited before `figures` asks. The
    flow's blocks are watched from outside, through hooks."""

    def __init__(self, flow: Flow):
        self._flow = flow
        self._passes, depth = 0, len(flow.blocks)
        # of [loss, mean z²], each block's log|det| a dimension, each block's mean z²
        self._sums = torch.zeros(2 + 2 * depth, dtype=torch.float64, device=flow.device)
        self._of_passes, self._block_z2 = self._sums[: 2 + depth], self._sums[2 + depth :]
        self._gradients = torch.zeros(depth, dtype=torch.float32, device=flow.device)
        self._bands = None
        if flow.sigma_range is not None:
            self._bands = NoiseBands(flow.sigma_range, flow.device)
        for t, block in enumerate(flow.blocks):
            assert isinstance(block, FlowBlock)
            block.register_forward_hook(partial(self._see_output, t))
            # all that goes wrong on the way back through a block comes down to its first weight
            block.proj_in.weight.register_hook(partial(self._see_gradient, t))

    def begin_step(self) -> None:
        """Forgets the last step."""
        self._passes = 0
        self._sums.zero_()
        self._gradients.zero_()
        if self._bands is not None:
            self._bands.sums.zero_()

    @torch.no_grad()
    def add(self, loss: Tensor, z: Tensor, logdets: Tensor, sigma: Tensor | None) -> None:
        """Takes in a pass.

        Args:
            loss: what was gone backward from.
            z: (B, N, D) latents.
            logdets: (T, B) of each block, in nats.
            sigma: (B,), the noise levels, of an iTARFlow.
        """
        self._passes += 1
        seen = [torch.stack([loss, z.square().mean()]), logdets.mean(dim=1) / self._flow.num_dims]
        self._of_passes += torch.cat(seen)
        if self._bands is not None:
            assert sigma is not None
            self._bands.add(sigma, self._flow.losses(z, logdets))

    def _see_output(
        self, t: int, block: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]
    ) -> None:
        self._block_z2[t] += output[0].detach().square().mean()

    def _see_gradient(self, t: int, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, ord=1, dtype=torch.float32)
        self._gradients[t].add_(norm)

    def culprit(self, loss: Tensor) -> str:
        """Where the numbers of the last step first stopped being finite, over all ranks: forward
        through the blocks, then the `loss`, summed over passes, then backward. Collective."""
        forward = torch.nonzero(~self._block_z2.isfinite()).flatten().tolist()
        backward = torch.nonzero(~self._gradients.isfinite()).flatten().tolist()
        here = None
        if forward:
            here = f"the output of block {forward[0]}"
        elif not loss.isfinite():
            here = "the loss"
        elif backward:
            here = f"the gradient of block {backward[-1]}"
        found = [(rank, what) for rank, what in enumerate(distributed.gather(here)) if what]
        return "{1} on rank {0}".format(*found[0]) if found else "the gradient's norm"

    def figures(self) -> dict[str, float]:
        """In nats a dimension. Collective."""
        count = self._passes * distributed.world_size()
        sums = distributed.sum_over_ranks(self._sums.clone())
        loss, z2, *blocks = (sums / count).tolist()
        depth = len(self._gradients)
        whole = {"loss": loss, "mean_z2": z2, "logdet": sum(blocks[:depth])}
        if self._flow.noise == "uniform":
            whole["bits_per_dim"] = bits_per_dim(log_prob_of(loss))
        bands = {} if self._bands is None else self._bands.figures()
        logdets = {f"logdet/block{t}": value for t, value in enumerate(blocks[:depth])}
        z2s = {f"mean_z2/block{t}": value for t, value in enumerate(blocks[depth:])}
        return {**whole, **bands, **logdets, **z2s}


class NoiseBands:
    """Mean losses of the images in each of four equal parts of `sigma_range`: one number over all
    noise levels hides which are learnt."""

    def __init__(self, sigma_range: tuple[float, float], device: torch.device):
        least, largest = sigma_range
        self._least, self._width = least, (largest - least) / BANDS
        self.sums = torch.zeros(2, BANDS, dtype=torch.float64, device=device)

    def add(self, sigma: Tensor, losses: Tensor) -> None:
        """Takes in the `losses` (B,) at the levels `sigma` (B,); those out of range belong to the
        part at that end."""
        part = ((sigma - self._least) / self._width).long().clamp(0, BANDS - 1)
        belongs = part[:, None] == torch.arange(BANDS, device=part.device)
        self.sums[0] += (belongs * losses[:, None].double()).sum(dim=0)
        self.sums[1] += belongs.sum(dim=0)

    def figures(self) -> dict[str, float]:
        """In nats a dimension, without weights; only of parts that had images. Collective."""
        losses, counts = distributed.sum_over_ranks(self.sums.clone()).tolist()
        edges = [self._least + k * self._width for k in range(BANDS + 1)]
        return {
            f"loss/sigma{edges[k]:.3g}-{edges[k + 1]:.3g}": losses[k] / counts[k]
            for k in range(BANDS)
            if counts[k]
        }
