"""The training images nearest to a few samples: would show a model that memorises."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_dist.distributed import gather
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.image_sets import ImageSet
from tarflow_dist.evaluation.sample_store import Pixels


class Neighbours:
    """The `k` nearest of many images to each of Q queries, by Euclidean distance of features.

    Args:
        queries: features (Q, F).
        k: how many are kept.
        device: where they are looked for.
    """

    def __init__(self, queries: Tensor, k: int, device: torch.device | str = "cpu"):
        self._queries = queries.to(device).double()
        self._k = k
        self.distances = torch.empty(len(queries), 0, dtype=torch.float64, device=device)
        """(Q, k), ascending; fewer columns if there were fewer images."""
        self.indexes = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
        """(Q, k), which images those are."""

    def add(self, index: Tensor, features: Tensor) -> None:
        """Takes the images `index` (B,) with their features (B, F)."""
        distances = torch.cdist(
            self._queries,
            features.to(self._queries),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        self._keep(distances, index.to(self.indexes).expand_as(distances))

    def reduce(self) -> None:
        """The nearest among all ranks' images, on every rank."""
        found = gather((self.distances.cpu(), self.indexes.cpu()))
        self.distances, self.indexes = self.distances[:, :0], self.indexes[:, :0]
        for distances, indexes in found:
            self._keep(distances.to(self.distances), indexes.to(self.indexes))

    def _keep(self, distances: Tensor, indexes: Tensor) -> None:
        distances = torch.cat([self.distances, distances], dim=1)
        indexes = torch.cat([self.indexes, indexes], dim=1)
        self.distances, nearest = distances.sort(dim=1, stable=True)
        self.distances = self.distances[:, : self._k]
        self.indexes = indexes.gather(1, nearest[:, : self._k])


@dataclass(frozen=True)
class NeighboursOf:
    """A sample and the training images nearest to it."""

    index: int
    sample: Pixels
    """(H, W, C)."""
    images: Pixels
    """(k, H, W, C), the nearest first."""
    distances: list[float]
    """(k,)."""
    among: float
    """The distance of the nearest image to the next of these: what is usual among images."""


def show_neighbours(
    found: Neighbours,
    first: int,
    count: int,
    samples: ImageSet,
    reference: ImageSet,
    extractor: FeatureExtractor,
) -> list[NeighboursOf]:
    """The neighbours of the queries `first` to `first` + `count`, which are the first of the
    `samples`, among the images of the `reference`."""
    device = found.distances.device
    shown = []
    for sample in range(count):
        pixels = reference.images(found.indexes[first + sample].tolist())
        features = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)).pooled
        among = torch.cdist(features[:1].double(), features[1:].double())
        shown.append(
            NeighboursOf(
                sample,
                samples.images([sample])[0],
                pixels,
                found.distances[first + sample].tolist(),
                float(among.min()),
            )
        )
    return shown
