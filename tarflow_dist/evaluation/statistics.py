"""Moments of an image set's features on any number of ranks, the Inception Score, and the Fréchet
distance."""

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


def inception_scores(logits: Tensor) -> list[float]:
    """exp(E KL(p(y|x) ‖ p(y))) of each of ten splits of N images in their order, or of fewer where
    there are fewer images (arXiv 1606.03498), from the logits (N, K). The divergence is the entropy
    of the mean less the mean entropy."""
    N, scores = len(logits), []
    for split in range(SPLITS):
        p = logits[split * N // SPLITS : (split + 1) * N // SPLITS].double().softmax(dim=1)
        if len(p):
            entropy = torch.special.entr(p.mean(dim=0)).sum()
            scores.append(float((entropy - torch.special.entr(p).sum(dim=1).mean()).exp()))
    return scores


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
