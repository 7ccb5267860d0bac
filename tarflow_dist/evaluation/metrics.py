"""What two image sets' features say of each other: the figures of a result."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.statistics import Gaussian, frechet_distance, symmetric_root
from tarflow_dist.telemetry.progress import Progress

NEIGHBOURHOOD = 3  # k of precision and recall
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
JACKKNIFE_GROUPS = 10
BLOCK = 256  # rows of a table of distances that are held at a time
FEATURES_MISSING = "the reference holds no features of single images, only their moments"


def compare(
    samples: FeatureSet, reference: FeatureSet, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """All figures that the two sets allow, as JSON values: None where there is none, and then
    "not_measured" says why.

    - frechet_distance, with frechet_distance_error, its standard error, and frechet_distance_bias,
      how much of it comes from the number of samples being finite; both by `jackknife`.
    - spatial_frechet_distance: sFID.
    - inception_score and inception_score_std, over ten splits.
    - precision and recall: the share of samples within the third-nearest-neighbour balls of the
      reference, and the other way round (arXiv 1904.06991).
    - kernel_distance and kernel_distance_std: KID (arXiv 1801.01401), over 100 subsets of 1,000 or
      of the smaller set.
    """
    assert samples.features is not None
    result: dict[str, Any] = {
        "frechet_distance": frechet_distance(*samples.pooled, *reference.pooled)
    }
    missing: dict[str, str] = {}
    error, bias = jackknife(samples.features, samples.pooled, reference.pooled, device)
    result |= {"frechet_distance_error": error, "frechet_distance_bias": bias}
    if error is None:
        missing["frechet_distance_error"] = f"fewer than {2 * JACKKNIFE_GROUPS} samples"

    result["spatial_frechet_distance"] = None
    if samples.spatial is None:
        missing["spatial_frechet_distance"] = "these features have no places"
    elif reference.spatial is None:
        missing["spatial_frechet_distance"] = "the reference holds no spatial statistics"
    else:
        result["spatial_frechet_distance"] = frechet_distance(*samples.spatial, *reference.spatial)

    scores = samples.split_scores
    if scores is None:
        missing["inception_score"] = "these features classify nothing"
    result["inception_score"] = float(np.mean(scores)) if scores else None
    result["inception_score_std"] = float(np.std(scores)) if scores else None

    names = ("precision", "recall", "kernel_distance", "kernel_distance_std")
    result |= dict.fromkeys(names)
    if reference.features is None:
        missing |= dict.fromkeys(names[:3], FEATURES_MISSING)
    elif min(len(samples.features), len(reference.features)) <= NEIGHBOURHOOD:
        missing |= dict.fromkeys(names[:3], "too few images")
    else:
        figures = (
            *precision_recall(samples.features, reference.features, device),
            *kernel_distance(samples.features, reference.features),
        )
        result |= dict(zip(names, figures, strict=True))
    return result | {"not_measured": missing}


def warnings(result: dict[str, Any], samples: FeatureSet, reference: FeatureSet) -> list[str]:
    """Sentences on what makes the figures of `result` less than they seem."""
    dim = len(samples.pooled.mean)
    found = []
    for what, about in (("samples", samples.about), ("reference images", reference.about)):
        if about["count"] is not None and about["count"] <= dim:
            found.append(
                f"{about['count']:,} {what} for {dim:,} features: the covariance is singular and "
                f"the Fréchet distance means little; take many more than {dim:,}"
            )
    distance, bias = result["frechet_distance"], result["frechet_distance_bias"]
    if not found and bias is not None and bias > 0.05 * distance:
        found.append(
            f"about {bias:.3g} of the Fréchet distance of {distance:.4g} comes from the small "
            f"number of samples, {samples.about['count']:,}: compare it only with distances at the "
            "same number, or draw more"
        )
    return found


def jackknife(
    features: NDArray[np.float32],
    samples: Gaussian,
    reference: Gaussian,
    device: torch.device | str = "cpu",
) -> tuple[float | None, float | None]:
    """Standard error and bias of the Fréchet distance between the samples' `features` (N, F) and
    the reference: it is taken anew without each tenth of the samples in turn (delete-a-group
    jackknife, Efron & Stein 1981). None where there are fewer than 20.

    The bias falls as 1/N (arXiv 1911.07023); the distance less its bias estimates that of endless
    samples.
    """
    N, groups = len(features), JACKKNIFE_GROUPS
    if 2 * groups > N:
        return None, None

    def tensor(values: NDArray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device=device)

    root = tensor(symmetric_root(reference.covariance))
    real = tensor(reference.mean)
    rest = float(np.trace(reference.covariance))
    mean = tensor(samples.mean)
    centred = tensor(samples.covariance) * (N - 1)  # Σ (x − μ)(x − μ)ᵀ

    def distance(mean: torch.Tensor, covariance: torch.Tensor) -> float:
        # faster than `frechet_distance`; what it loses is the same in all of these
        overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        return float((mean - real).square().sum() + covariance.trace() + rest - 2 * overlap)

    without = []
    with Progress("spread", groups, unit="distance") as progress:
        for g in range(groups):
            group = tensor(features[g * N // groups : (g + 1) * N // groups]) - mean
            n = N - len(group)
            offset = -group.sum(dim=0) / n  # of the others' mean from the mean of all
            others = centred - group.T @ group - n * torch.outer(offset, offset)
            without.append(distance(mean + offset, others / (n - 1)))
            progress.update(1)
    values = np.array(without)
    error = np.sqrt((groups - 1) / groups * np.square(values - values.mean()).sum())
    bias = (groups - 1) * (values.mean() - distance(mean, centred / (N - 1)))
    return float(error), float(bias)


def precision_recall(
    samples: NDArray[np.float32], reference: NDArray[np.float32], device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Of features (N, F) and (M, F). By torch-fidelity's rule; its own function takes minutes for
    50,000 samples on a CPU, and moves all distances there from a GPU."""
    x, y = (torch.from_numpy(features).to(device) for features in (samples, reference))
    radii_x, radii_y = _squared_radii(x), _squared_radii(y)
    reached = torch.zeros(len(y), dtype=torch.bool, device=device)
    within = 0
    for start in range(0, len(x), BLOCK):
        squares = _squared_distances(x[start : start + BLOCK], y)
        within += int((squares <= radii_y).any(dim=1).sum())
        reached |= (squares <= radii_x[start : start + BLOCK, None]).any(dim=0)
    return within / len(x), float(reached.double().mean())


def _squared_radii(x: torch.Tensor) -> torch.Tensor:
    """Of each row's ball, which reaches its third neighbour."""
    nearest = [
        _squared_distances(x[start : start + BLOCK], x).topk(
            NEIGHBOURHOOD + 1,  # itself is one of them
            dim=1,
            largest=False,
        )
        for start in range(0, len(x), BLOCK)
    ]
    return torch.cat([found.values.amax(dim=1) for found in nearest])


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2) + a.square().sum(dim=1)[:, None]


def kernel_distance(
    samples: NDArray[np.float32], reference: NDArray[np.float32]
) -> tuple[float, float]:
    """Mean and standard deviation over subsets, by torch-fidelity with its own kernel and seed."""
    from torch_fidelity import metric_kid

    result = metric_kid.kid_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(reference),
        kid_subsets=KERNEL_SUBSETS,
        kid_subset_size=min(KERNEL_SUBSET_SIZE, len(samples), len(reference)),
        verbose=False,
    )
    return result[metric_kid.KEY_METRIC_KID_MEAN], result[metric_kid.KEY_METRIC_KID_STD]
