"""The third stage of `sample_fid`: what two image sets' features say of each other. A metric is one
row of `METRICS`.

The ranks share what takes long, and the figures are those of one rank to the last bit: each part of
it is done by one rank alone, and what is added up over ranks is 0 on all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_dist import distributed
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.telemetry.progress import Progress

Device = torch.device | str
Array = NDArray[np.float64]

ABOUT = ("features", "features_sha256", "samples_sha256")  # of the samples, said in a result
NEIGHBOURHOOD = 3  # k of precision and recall
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
JACKKNIFE_GROUPS = 10
BLOCK = 512  # rows of a table of distances that are held at a time


class UnmeasurableError(Exception):
    """Why these two sets don't have a figure."""


@dataclass(frozen=True)
class Metric:
    """One figure of a result, and those that come with it."""

    name: str
    """Its key in result.json."""
    title: str
    """For people; empty if it is shown with another one."""
    meaning: str
    """For people who don't know it."""
    measure: Callable[[FeatureSet, FeatureSet, Device], tuple[float, ...]]
    """Samples, reference and a device → the figure and those of `more`. Collective."""
    more: tuple[str, ...] = ()
    """Keys of the figures that come with it."""
    spread: str = ""
    """Key of its uncertainty, if it has one."""
    plain_title: str = ""
    """On other features than Inception's, if it has another name there."""
    digits: int = 4
    """Shown."""

    def title_on(self, features: str) -> str:
        """Its title on the features called `features`."""
        return self.title if features.startswith("inception") else self.plain_title or self.title


def compare(samples: FeatureSet, reference: FeatureSet, device: Device = "cpu") -> dict[str, Any]:
    """All of `METRICS` that the two sets, the same on all ranks, allow, as a result says them: by
    the keys in `FIGURES`, None where one was not measured; "not_measured" says why, "warnings" what
    makes the figures less than they seem; and what they are of. Collective."""
    figures: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for metric in METRICS:
        names = (metric.name, *metric.more)
        try:
            figures |= dict(zip(names, metric.measure(samples, reference, device), strict=True))
        except UnmeasurableError as reason:
            figures |= dict.fromkeys(names)
            missing[metric.name] = str(reason)
    return {
        **figures,
        "not_measured": missing,
        "warnings": warnings(figures, samples, reference),
        **{name: samples.about.get(name) for name in ABOUT},
    }


def _own(parts: range) -> range:
    """Those that fall to this rank."""
    return parts[distributed.rank() :: distributed.world_size()]


def warnings(
    figures: dict[str, float | None], samples: FeatureSet, reference: FeatureSet
) -> list[str]:
    """Sentences on what makes the `figures` less than they seem."""
    dim = len(samples.pooled.mean)
    found = []
    for what, about in (("samples", samples.about), ("reference images", reference.about)):
        if about["count"] is not None and about["count"] <= dim:
            found.append(
                f"{about['count']:,} {what} for {dim:,} features: the covariance is singular and "
                f"the Fréchet distance means little; take many more than {dim:,}"
            )
    distance, bias = figures["frechet_distance"], figures["frechet_distance_bias"]
    if not found and distance is not None and bias is not None and bias > 0.05 * distance:
        found.append(
            f"about {bias:.3g} of the Fréchet distance of {distance:.4g} comes from the small "
            f"number of samples, {samples.about['count']:,}: compare it only with distances at the "
            "same number, or draw more"
        )
    return found


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


def _frechet(samples: FeatureSet, reference: FeatureSet, device: Device) -> tuple[float]:
    return (frechet_distance(*samples.pooled, *reference.pooled),)


def _spatial(samples: FeatureSet, reference: FeatureSet, device: Device) -> tuple[float]:
    if samples.spatial is None:
        raise UnmeasurableError("these features have no places")
    if reference.spatial is None:
        raise UnmeasurableError("the reference holds no spatial statistics")
    return (frechet_distance(*samples.spatial, *reference.spatial),)


def _inception_score(
    samples: FeatureSet, reference: FeatureSet, device: Device
) -> tuple[float, float]:
    scores = samples.split_scores
    if scores is None:
        raise UnmeasurableError("these features classify nothing")
    return float(np.mean(scores)), float(np.std(scores))


def jackknife(
    samples: FeatureSet, reference: FeatureSet, device: Device = "cpu"
) -> tuple[float, float]:
    """Standard error and bias of the Fréchet distance: it is taken anew without each tenth of the
    samples in turn (delete-a-group jackknife, Efron & Stein 1981). Collective.

    The bias falls as 1/N (arXiv 1911.07023); the distance less its bias estimates that of endless
    samples.

    Raises:
        UnmeasurableError: fewer than 20 samples.
    """
    assert samples.features is not None
    N, groups = len(samples.features), JACKKNIFE_GROUPS
    if 2 * groups > N:
        raise UnmeasurableError(f"fewer than {2 * groups} samples")

    def tensor(values: NDArray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device=device)

    root = tensor(symmetric_root(reference.pooled.covariance))
    real = tensor(reference.pooled.mean)
    rest = float(np.trace(reference.pooled.covariance))
    mean = tensor(samples.pooled.mean)
    centred = tensor(samples.pooled.covariance) * (N - 1)  # Σ (x − μ)(x − μ)ᵀ

    def distance(mean: torch.Tensor, covariance: torch.Tensor) -> float:
        # faster than `frechet_distance`; what it loses is the same in all of these
        overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        return float((mean - real).square().sum() + covariance.trace() + rest - 2 * overlap)

    distances = torch.zeros(groups + 1, dtype=torch.float64)  # each without a group, and of all
    own = _own(range(groups + 1))
    with Progress("spread", len(own), unit="distance", enabled=distributed.is_main()) as progress:
        for g in own:
            group = tensor(samples.features[g * N // groups : (g + 1) * N // groups]) - mean
            n = N - len(group)
            offset = -group.sum(dim=0) / n  # of the others' mean from the mean of all
            others = centred - group.T @ group - n * torch.outer(offset, offset)
            distances[g] = distance(mean + offset, others / (n - 1))
            progress.update(1)
    distributed.sum_over_ranks(distances)
    values, whole = distances[:-1].numpy(), float(distances[-1])
    error = np.sqrt((groups - 1) / groups * np.square(values - values.mean()).sum())
    bias = (groups - 1) * (values.mean() - whole)
    return float(error), float(bias)


def _both_features(
    samples: FeatureSet, reference: FeatureSet
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    assert samples.features is not None
    if reference.features is None:
        raise UnmeasurableError(
            "the reference holds no features of single images, only their moments"
        )
    if min(len(samples.features), len(reference.features)) <= NEIGHBOURHOOD:
        raise UnmeasurableError("too few images")
    return samples.features, reference.features


def _precision(samples: FeatureSet, reference: FeatureSet, device: Device) -> tuple[float]:
    x, y = _both_features(samples, reference)
    return (share_within(x, y, device),)


def _recall(samples: FeatureSet, reference: FeatureSet, device: Device) -> tuple[float]:
    x, y = _both_features(samples, reference)
    return (share_within(y, x, device),)


def share_within(
    points: NDArray[np.float32], of: NDArray[np.float32], device: Device = "cpu"
) -> float:
    """The share of `points` (N, F) that lie within the ball to its third-nearest neighbour of at
    least one in `of` (M, F) (arXiv 1904.06991). By torch-fidelity's rule; its own function takes
    minutes for 50,000 samples on a CPU, and moves all distances there from a GPU. Collective."""
    x, y = (torch.from_numpy(features).to(device) for features in (points, of))
    radii = y.new_zeros(len(y))
    for start in _own(range(0, len(y), BLOCK)):
        block = slice(start, start + BLOCK)
        distances = torch.cdist(y[block], y)
        radii[block] = distances.kthvalue(NEIGHBOURHOOD + 1).values  # itself is one of them
    distributed.sum_over_ranks(radii)
    within = torch.zeros((), dtype=torch.int64, device=device)
    for start in _own(range(0, len(x), BLOCK)):
        within += (torch.cdist(x[start : start + BLOCK], y) <= radii).any(dim=1).sum()
    return int(distributed.sum_over_ranks(within)) / len(x)


def _kernel_distance(
    samples: FeatureSet, reference: FeatureSet, device: Device
) -> tuple[float, float]:
    """Mean and standard deviation over subsets, by torch-fidelity with its own kernel and seed."""
    from torch_fidelity import metric_kid

    x, y = _both_features(samples, reference)
    result = metric_kid.kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        kid_subsets=KERNEL_SUBSETS,
        kid_subset_size=min(KERNEL_SUBSET_SIZE, len(x), len(y)),
        verbose=False,
    )
    return result[metric_kid.KEY_METRIC_KID_MEAN], result[metric_kid.KEY_METRIC_KID_STD]


# what each figure means, for people, with the paper's number at arXiv
FID = "distance of the features' means and covariances (1706.08500); lower is better"
FID_ERROR = "standard error of the distance, and how much of it finitely many samples make up"
SFID = "the same on features that know where things are (2103.03841); lower is better"
SCORE = "how sure and how varied a classifier is of the samples (1606.03498); higher is better"
PRECISION = "share of samples among the reference images (1904.06991); higher is better"
RECALL = "share of reference images among the samples (1904.06991); higher is better"
KID = "distance of kernel means, for any number of samples (1801.01401); lower is better"

METRICS = (
    Metric(
        *("frechet_distance", "FID", FID, _frechet),
        spread="frechet_distance_error",
        plain_title="Fréchet distance",
        digits=5,
    ),
    Metric("frechet_distance_error", "", FID_ERROR, jackknife, more=("frechet_distance_bias",)),
    Metric("spatial_frechet_distance", "sFID", SFID, _spatial),
    Metric(
        *("inception_score", "Inception Score", SCORE, _inception_score),
        more=("inception_score_std",),
        spread="inception_score_std",
    ),
    Metric("precision", "precision", PRECISION, _precision),
    Metric("recall", "recall", RECALL, _recall),
    Metric(
        *("kernel_distance", "KID", KID, _kernel_distance),
        more=("kernel_distance_std",),
        spread="kernel_distance_std",
        plain_title="kernel distance",
    ),
)
FIGURES = tuple(name for metric in METRICS for name in (metric.name, *metric.more))
"""Their keys in result.json."""
