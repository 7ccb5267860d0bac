"""An iTARFlow's loss by noise level: one number over all of them hides which are learnt."""

import torch
from torch import Tensor

from tarflow_dist import distributed

BANDS = 4


class NoiseBands:
    """Mean losses of the images in each of four equal parts of `sigma_range`."""

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
