"""The figures of a training step: what its passes over the batch saw, as means over all ranks."""

import torch
from torch import Tensor

from tarflow_dist import distributed
from tarflow_dist.flow.bits_per_dim import bits_per_dim, log_prob_of
from tarflow_dist.flow.model import Flow

BANDS = 4


class StepMetrics:
    """Sums over a step's passes, kept on the device: nothing is awaited before `figures` asks."""

    def __init__(self, flow: Flow, device: torch.device):
        self._flow = flow
        self._passes = 0
        # of [loss, mean z², each block's log|det| a dimension]
        self._sums = torch.zeros(2 + len(flow.blocks), dtype=torch.float64, device=device)
        self._bands = None if flow.sigma_range is None else NoiseBands(flow.sigma_range, device)

    @torch.no_grad()
    def add(self, loss: Tensor, z: Tensor, logdets: Tensor) -> None:
        """Takes in a pass.

        Args:
            loss: what was gone backward from.
            z: (B, N, D) latents.
            logdets: (T, B) of each block, in nats.
        """
        self._passes += 1
        seen = [torch.stack([loss, z.square().mean()]), logdets.mean(dim=1) / self._flow.num_dims]
        self._sums += torch.cat(seen)

    def add_by_noise_level(self, sigma: Tensor, losses: Tensor) -> None:
        """Takes in the unweighted `losses` (B,) of a pass at the noise levels `sigma` (B,), of an
        iTARFlow."""
        assert self._bands is not None
        self._bands.add(sigma, losses.detach())

    def figures(self, block_z2: Tensor) -> dict[str, float]:
        """In nats a dimension. `block_z2` (T,) are each block's mean z², summed over the passes.
        Collective."""
        sums = torch.cat([self._sums, block_z2])
        count = self._passes * distributed.world_size()
        loss, z2, *blocks = (distributed.sum_over_ranks(sums) / count).tolist()
        depth = len(blocks) // 2
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
        self._sums = torch.zeros(2, BANDS, dtype=torch.float64, device=device)

    def add(self, sigma: Tensor, losses: Tensor) -> None:
        """Takes in the `losses` (B,) at the levels `sigma` (B,); those out of range belong to the
        part at that end."""
        part = ((sigma - self._least) / self._width).long().clamp(0, BANDS - 1)
        belongs = part[:, None] == torch.arange(BANDS, device=part.device)
        self._sums[0] += (belongs * losses[:, None].double()).sum(dim=0)
        self._sums[1] += belongs.sum(dim=0)

    def figures(self) -> dict[str, float]:
        """In nats a dimension, without weights; only of parts that had images. Collective."""
        losses, counts = distributed.sum_over_ranks(self._sums.clone()).tolist()
        edges = [self._least + k * self._width for k in range(BANDS + 1)]
        return {
            f"loss/sigma{edges[k]:.3g}-{edges[k + 1]:.3g}": losses[k] / counts[k]
            for k in range(BANDS)
            if counts[k]
        }
