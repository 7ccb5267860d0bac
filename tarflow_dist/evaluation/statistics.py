"""Sums over the images of a set on any number of ranks, and the Fréchet distance."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist.distributed import sum_over_ranks
from tarflow_dist.errors import UserError

Array = NDArray[np.float64]
SPLITS = 10
"""Of the Inception Score."""


class Gaussian(NamedTuple):
    """The first two moments of an image set's features."""

    mean: Array
    """(F,)."""
    covariance: Array
    """(F, F)."""


class Statistics:
    """Σx, Σxxᵀ and the count of features, in float64.

    Args:
        dim: F, features an image.
        device: where the sums are kept.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Takes the features (B, F) of B images."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer.addmm_(features.T, features)

    def reduce(self) -> None:
        """Adds up all ranks' sums, in place, so that every rank has the whole."""
        for total in (self.count, self.sum, self.outer):
            sum_over_ranks(total)

    def gaussian(self) -> Gaussian:
        """μ, and the unbiased estimate of Σ: (Σxxᵀ − n·μμᵀ)/(n − 1).

        Raises:
            UserError: fewer than two images.
        """
        if self.count < 2:
            raise UserError(
                f"a mean and a covariance need at least 2 images, and there are {int(self.count)}: "
                "take more"
            )
        mean = self.sum / self.count
        centred = self.outer - self.count * torch.outer(mean, mean)
        return Gaussian(mean.cpu().numpy(), (centred / (self.count - 1)).cpu().numpy())


class InceptionScore:
    """exp(E KL(p(y|x) ‖ p(y))) of each of ten splits of the set, in the order of the images
    (arXiv 1606.03498). Keeps Σp and Σ p·log p of each split, for
    E KL(p ‖ q) = E Σ p·log p − Σ q·log q where q = E p.

    Args:
        total: N; split s has the images s·N//10 to (s + 1)·N//10.
        num_classes: K.
    """

    def __init__(self, total: int, num_classes: int, device: torch.device | str = "cpu"):
        self._ends = torch.tensor([(s + 1) * total // SPLITS for s in range(SPLITS)])
        self._counts = torch.zeros(SPLITS, dtype=torch.float64, device=device)
        self._p = torch.zeros(SPLITS, num_classes, dtype=torch.float64, device=device)
        self._p_log_p = torch.zeros(SPLITS, dtype=torch.float64, device=device)

    def add(self, index: Tensor, logits: Tensor) -> None:
        """Takes the logits (B, K) of the images `index` (B,)."""
        split = torch.searchsorted(self._ends, index, right=True).to(self._p.device)
        log_p = logits.to(self._p).log_softmax(dim=1)
        p = log_p.exp()
        self._counts.index_add_(0, split, torch.ones_like(p[:, 0]))
        self._p.index_add_(0, split, p)
        self._p_log_p.index_add_(0, split, (p * log_p).sum(dim=1))

    def reduce(self) -> None:
        """Adds up all ranks' sums, in place."""
        for total in (self._counts, self._p, self._p_log_p):
            sum_over_ranks(total)

    def of_splits(self) -> list[float]:
        """The score of each split that has images."""
        q = self._p / self._counts[:, None]
        divergence = self._p_log_p / self._counts - torch.special.xlogy(q, q).sum(dim=1)
        return [score for score in divergence.exp().tolist() if not math.isnan(score)]


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2·tr (√Σ₁·Σ₂·√Σ₁)^½: the squared 2-Wasserstein distance between
    two Gaussians (Heusel et al., arXiv 1706.08500, equation 6).

    The last trace is the sum of the singular values of √Σ₁·√Σ₂. Eigenvalues of the product, or a
    general matrix root, would turn rounding errors ε into √ε in every empty direction of a
    rank-deficient covariance (fewer images than features), or turn complex; so taken, equal sets
    are at distance 0.

    Args:
        mean1, mean2: (F,).
        cov1, cov2: (F, F), symmetric, positive semi-definite up to rounding.
    """
    overlap = np.linalg.svd(symmetric_root(cov1) @ symmetric_root(cov2), compute_uv=False).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(float(distance), 0.0)


def symmetric_root(cov: Array) -> Array:
    """√Σ of a covariance (F, F), eigenvalues below 0, which are rounding errors, taken as 0."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
