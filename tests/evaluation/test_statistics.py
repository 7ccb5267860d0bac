"""Statistics against numpy, the Fréchet distance against scipy and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import ranks
import scipy.linalg
import torch

from tarflow_dist import distributed
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.feature_set import Statistics
from tarflow_dist.evaluation.metrics import frechet_distance


def features(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dim, dim)) / dim**0.5 + np.eye(dim)
    return rng.normal(size=(count, dim)) @ mixing + seed


def exact_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The distance straight from the features, without a matrix root: with centred X and Y,
    tr (√Σ₁Σ₂√Σ₁)^½ is the sum of the singular values of XYᵀ."""
    a = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap


def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


def test_mean_and_covariance_equal_numpy_over_uneven_batches() -> None:
    x = features(101, 7)
    statistics = Statistics(7)
    for batch in np.split(x, [1, 40, 41]):
        statistics.add(torch.from_numpy(batch))
    found = statistics.gaussian()
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-10)


def test_float32_features_are_summed_in_float64() -> None:
    x = torch.from_numpy(features(50, 3)).float()
    statistics = Statistics(3)
    statistics.add(x)
    np.testing.assert_allclose(statistics.gaussian().mean, x.double().mean(0), rtol=1e-14)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(count: int) -> None:
    statistics = Statistics(2)
    statistics.add(torch.zeros(count, 2))
    with pytest.raises(UserError, match=f"at least 2 images, and there are {count}"):
        statistics.gaussian()


def _two_ranks(folder: Path, x: np.ndarray) -> None:
    distributed.init()
    statistics = Statistics(x.shape[1])
    rank = distributed.rank()
    statistics.add(torch.from_numpy(x[:10] if rank == 0 else x[10:]))
    statistics.reduce()
    np.save(folder / f"{rank}.npy", statistics.gaussian().covariance)
    distributed.shutdown()


def test_two_ranks_have_the_statistics_of_the_whole(tmp_path: Path) -> None:
    x = features(31, 5)
    ranks.run(_two_ranks, tmp_path, x, ranks=2)
    for rank in range(2):
        there = np.load(tmp_path / f"{rank}.npy")
        np.testing.assert_allclose(there, np.cov(x, rowvar=False), rtol=1e-10)


def test_distance_equals_scipy_for_well_conditioned_covariances() -> None:
    (mean1, cov1), (mean2, cov2) = gaussian(features(400, 20)), gaussian(features(500, 20, seed=1))
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-10)


def test_distance_of_diagonal_gaussians() -> None:
    """|μ₁ − μ₂|² + Σ (σ₁ − σ₂)²."""
    rng = np.random.default_rng(0)
    mean1, mean2 = rng.normal(size=(2, 6))
    std1, std2 = rng.uniform(0.1, 3, size=(2, 6))
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    actual = frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2))
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count1", "count2"), [(20, 20), (20, 35), (20, 500), (2, 2)])
def test_distance_of_rank_deficient_covariances(count1: int, count2: int) -> None:
    scale = np.geomspace(1, 1e-3, 100)
    x, y = features(count1, 100) * scale, features(count2, 100, seed=1) * scale
    actual = frechet_distance(*gaussian(x), *gaussian(y))
    assert actual == pytest.approx(exact_distance(x, y), rel=1e-7)


def test_distance_of_a_rank_deficient_set_to_itself_is_zero() -> None:
    mean, cov = gaussian(features(20, 100))
    assert frechet_distance(mean, cov, mean, cov) < 1e-11


def test_distance_of_constant_images() -> None:
    zero, one, cov = np.zeros(4), np.ones(4), np.zeros((4, 4))
    assert frechet_distance(zero, cov, one, cov) == 4.0
