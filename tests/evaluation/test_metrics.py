"""The figures against torch-fidelity's own functions, and against the formulas written out."""

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from torch_fidelity import metric_fid, metric_isc, metric_prc

from tarflow_dist import distributed
from tarflow_dist.evaluation import metrics
from tarflow_dist.evaluation.feature_set import FeatureSet, Gaussian
from tarflow_dist.evaluation.measure import inception_scores
from tarflow_dist.evaluation.metrics import (
    FIGURES,
    UnmeasurableError,
    compare,
    frechet_distance,
    jackknife,
    share_within,
)

DIM = 2048


def features(count: int, dim: int = DIM, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """As Inception's: not below 0, and most of their variance in few directions."""
    rng = np.random.default_rng(seed)
    few = min(dim, 6)
    mixing = np.random.default_rng(99).normal(size=(few, dim)) / few**0.5
    noise = 0.02 * rng.normal(size=(count, dim))
    return np.abs(scale * rng.normal(size=(count, few)) @ mixing + noise + 0.05 * seed).astype("f4")


def gaussian(x: np.ndarray) -> Gaussian:
    return Gaussian(x.mean(0, dtype=np.float64), np.cov(x.astype(np.float64), rowvar=False))


def feature_set(x: np.ndarray, **more: object) -> FeatureSet:
    return FeatureSet(gaussian(x), features=x, about={"count": len(x)}, **more)


def measured(name: str, sets: tuple[np.ndarray, np.ndarray]) -> tuple[float, ...]:
    """A row of the table alone."""
    (metric,) = (metric for metric in metrics.METRICS if metric.name == name)
    return metric.measure(*map(feature_set, sets), "cpu")


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    return features(700), features(500, seed=1, scale=0.9)


def test_distance_equals_torch_fidelity_at_2048_dimensions(
    sets: tuple[np.ndarray, np.ndarray],
) -> None:
    """Well-conditioned: each set's covariance, plus that of independent noise."""
    (mean1, cov1), (mean2, cov2) = map(gaussian, sets)
    cov1, cov2 = cov1 + 0.3 * np.eye(DIM), cov2 + 0.2 * np.eye(DIM)
    theirs = metric_fid.fid_statistics_to_metric(
        {"mu": mean1, "sigma": cov1}, {"mu": mean2, "sigma": cov2}, False
    )[metric_fid.KEY_METRIC_FID]
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall(sets: tuple[np.ndarray, np.ndarray]) -> None:
    """A sample counts if it lies within the ball of a reference image, whose radius is the distance
    to its third neighbour; recall the other way round."""
    samples, real = (x.astype(np.float64) for x in sets)

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.sqrt(square.clip(min=0))

    def radii(a: np.ndarray) -> np.ndarray:
        return np.sort(distances(a, a), axis=1)[:, 3]  # 0 is the image itself

    between = distances(samples, real)
    precision = (between <= radii(real)).any(1).mean()
    recall = (radii(samples) >= between.T).any(1).mean()
    assert 0.02 < precision < 0.98
    assert 0.02 < recall < 0.98
    # a float32 distance may fall on the other side of a radius
    x, y = sets
    ours = share_within(x, y), share_within(y, x)
    assert ours == pytest.approx((precision, recall), abs=0.003)
    theirs = metric_prc.calculate_precision_recall_full(*map(torch.from_numpy, sets))
    assert ours == pytest.approx(theirs, abs=0.003)
    assert (*measured("precision", sets), *measured("recall", sets)) == ours


def compare_counted(out: Path) -> None:
    """Writes the figures, and the rows that each rank took distances of, block by block."""
    distributed.init()
    distances, rows = torch.cdist, []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows.append(len(a))
        return distances(a, b)

    torch.cdist = counted
    metrics.BLOCK = 50
    x, y = features(620, 64), features(430, 64, seed=1, scale=0.9)
    spatial = gaussian(x[:, :32])
    samples = feature_set(x, spatial=spatial, split_scores=[1.0, 3.0])
    found = compare(samples, feature_set(y, spatial=gaussian(y[:, :32])))
    by_rank = distributed.gather(rows)
    if distributed.is_main():
        out.write_text(json.dumps({"figures": [found[name] for name in FIGURES], "rows": by_rank}))
    distributed.shutdown()


def test_ranks_share_the_work_and_find_the_same(tmp_path: Path) -> None:
    found = {}
    for count in (1, 2, 3):
        ranks.run(compare_counted, tmp_path / str(count), ranks=count)
        found[count] = json.loads((tmp_path / str(count)).read_text())
    assert None not in found[1]["figures"]
    for count in (2, 3):
        assert found[count]["figures"] == found[1]["figures"]  # to the last bit
        assert sum(map(sum, found[count]["rows"])) == 2 * (620 + 430)  # no rank another's
        assert max(map(len, found[count]["rows"])) <= len(found[1]["rows"][0]) / count + 4


def test_kernel_distance(sets: tuple[np.ndarray, np.ndarray]) -> None:
    """Unbiased MMD² with the kernel (x·y/dim + 1)³, over all images: the mean over subsets is
    an estimate of the same."""
    x, y = (x.astype(np.float64) for x in sets)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / DIM + 1) ** 3

    def mean_off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    expected = (
        mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    )
    mean, std = measured("kernel_distance", sets)
    assert abs(mean - expected) < 5 * std / np.sqrt(metrics.KERNEL_SUBSETS) < 0.1 * mean


@pytest.mark.parametrize("count", [200, 1003])
def test_inception_score(count: int) -> None:
    logits = torch.randn(count, 1008, generator=torch.Generator().manual_seed(0)) * 2
    splits = inception_scores(logits)
    theirs = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert np.mean(splits) == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert np.std(splits) == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_STD], rel=1e-6)
    if count == 200:  # ADM's: consecutive parts of one size
        p = logits.double().softmax(1).numpy()
        parts = [p[i : i + 20] for i in range(0, 200, 20)]
        adm = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]
        assert splits == pytest.approx(adm, rel=1e-9)


def test_fewer_samples_than_splits() -> None:
    assert inception_scores(torch.zeros(3, 5)) == pytest.approx([1.0] * 3)


def test_spread_and_bias_are_those_of_many_sets() -> None:
    """Draws 300 sets of 400 from one Gaussian: the jackknife of one set tells their standard
    deviation, and how far their mean lies above the distance of endless samples."""
    rng = np.random.default_rng(0)
    dim, count = 12, 400
    std = np.geomspace(0.5, 2, dim)
    reference = Gaussian(np.full(dim, 0.1), np.eye(dim))
    truth = frechet_distance(np.zeros(dim), np.diag(std**2), *reference)
    distances, errors, biases = [], [], []
    for _ in range(300):
        x = (rng.normal(size=(count, dim)) * std).astype(np.float32)
        distances.append(frechet_distance(*gaussian(x), *reference))
        if len(errors) < 60:
            error, bias = jackknife(feature_set(x), FeatureSet(reference))
            errors.append(error)
            biases.append(bias)
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.15)
    assert np.mean(biases) == pytest.approx(np.mean(distances) - truth, rel=0.25)


def test_jackknife_without_each_tenth_written_out() -> None:
    x, y = features(57, 5), features(80, 5, seed=1)
    without = []
    for g in range(10):
        kept = np.delete(x, range(g * 57 // 10, (g + 1) * 57 // 10), axis=0)
        without.append(frechet_distance(*gaussian(kept), *gaussian(y)))
    error = np.sqrt(0.9 * ((np.array(without) - np.mean(without)) ** 2).sum())
    bias = 9 * (np.mean(without) - frechet_distance(*gaussian(x), *gaussian(y)))
    assert jackknife(feature_set(x), feature_set(y)) == pytest.approx((error, bias), rel=1e-4)
    with pytest.raises(UnmeasurableError, match="fewer than 20 samples"):
        jackknife(feature_set(x[:19]), feature_set(y))


def test_what_the_sets_lack_is_said() -> None:
    x, y = features(30, 5), features(40, 5, seed=1)
    bare = FeatureSet(gaussian(y), about={"count": None})
    found = compare(feature_set(x), bare)
    assert found["frechet_distance"] > 0
    for name in ("precision", "recall", "kernel_distance"):
        assert found[name] is None
        assert "no features of single images" in found["not_measured"][name]
    assert "classify nothing" in found["not_measured"]["inception_score"]
    spatial = feature_set(x, spatial=gaussian(x), split_scores=[1.0, 3.0])
    missing = compare(spatial, bare)["not_measured"]
    assert "no spatial statistics" in missing["spatial_frechet_distance"]
    both = compare(spatial, feature_set(y, spatial=gaussian(y)))
    assert both["spatial_frechet_distance"] == both["frechet_distance"]
    assert (both["inception_score"], both["inception_score_std"]) == (2.0, 1.0)
    few = compare(feature_set(x[:3]), feature_set(y))
    assert few["not_measured"]["recall"] == "too few images"
    assert few["not_measured"]["frechet_distance_error"] == "fewer than 20 samples"


def test_warnings() -> None:
    x, y = features(400, 5), features(400, 5, seed=30)

    def of(samples: np.ndarray) -> list[str]:
        return compare(feature_set(samples), feature_set(y))["warnings"]

    assert of(x) == []
    assert "5 samples for 5 features: the covariance is singular" in of(x[:5])[0]
    near = features(30, 5, seed=30)
    assert "comes from the small number of samples, 30" in of(near)[0]
