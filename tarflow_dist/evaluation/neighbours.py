"""The training images nearest to a few samples: would show a model that memorises."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tarflow_dist.distributed import gather
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.image_sets import ImageSet, Pixels

QUERIES, NEAREST = 8, 6  # samples of each set, and images for each


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


class Neighbours:
    """The images of a `reference` nearest to the first samples of each of `sets`, by Euclidean
    distance of the features that `extractor` sees, on `device`."""

    def __init__(
        self,
        sets: Sequence[ImageSet],
        reference: ImageSet,
        extractor: FeatureExtractor,
        device: torch.device | str = "cpu",
    ):
        self._sets, self._reference = sets, reference
        first = [images.images(range(min(QUERIES, len(images)))) for images in sets]
        pixels = torch.from_numpy(np.concatenate(first)).permute(0, 3, 1, 2).to(device)
        self._queries = extractor(pixels).pooled.double()
        self.distances = torch.empty(len(self._queries), 0, dtype=torch.float64, device=device)
        """(sets · queries, k), ascending; fewer columns if there were fewer images."""
        self.indexes = torch.empty(len(self._queries), 0, dtype=torch.int64, device=device)
        """The same shape, which images those are."""

    def add(self, index: Tensor, features: Tensor) -> None:
        """Takes the images `index` (B,) of the reference, with their features (B, F)."""
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

    def of(self, place: int) -> list[NeighboursOf]:
        """Those of the set at `place`."""
        count = len(self._queries) // len(self._sets)
        rows = slice(place * count, (place + 1) * count)
        samples = self._sets[place].images(range(count))
        found = zip(
            samples, self.indexes[rows].tolist(), self.distances[rows].tolist(), strict=True
        )
        return [
            NeighboursOf(index, sample, self._reference.images(nearest), distances)
            for index, (sample, nearest, distances) in enumerate(found)
        ]

    def _keep(self, distances: Tensor, indexes: Tensor) -> None:
        distances = torch.cat([self.distances, distances], dim=1)
        indexes = torch.cat([self.indexes, indexes], dim=1)
        self.distances, nearest = distances.sort(dim=1, stable=True)
        self.distances = self.distances[:, :NEAREST]
        self.indexes = indexes.gather(1, nearest[:, :NEAREST])
