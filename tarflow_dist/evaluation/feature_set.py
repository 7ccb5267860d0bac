"""An image set as its features describe it, and the .npz files that hold such descriptions: ours,
ADM's and pytorch-fid's. Nothing is unpickled."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist.distributed import sum_over_ranks
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.image_sets import open_npz
from tarflow_dist.files import take_version, write_whole

VERSION = 1  # of our own files
LARGEST = 1e60  # that a feature or a moment may be: squares of it are still numbers


class Gaussian(NamedTuple):
    """The first two moments of an image set's features."""

    mean: NDArray[np.float64]
    """(F,)."""
    covariance: NDArray[np.float64]
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


@dataclass(frozen=True)
class FeatureSet:
    """What is left of an image set to compare it with others.

    Attributes:
        pooled: moments of the features.
        spatial: moments of the spatial features, for sFID; None where there are none.
        features: float32 (K, F) of K of the images, in order; None where there are none.
        split_scores: the Inception Score of each of ten splits of those; None without class scores.
        about: JSON values that say where all this is from; "count" is the number of images, None
            where a file doesn't tell.
    """

    pooled: Gaussian
    spatial: Gaussian | None = None
    features: NDArray[np.float32] | None = None
    split_scores: list[float] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Writes an .npz with ADM's names (mu, sigma, mu_s, sigma_s) and features, split_scores
        and about (JSON text) besides."""
        arrays: dict[str, Any] = {"mu": self.pooled.mean, "sigma": self.pooled.covariance}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.features is not None:
            arrays["features"] = self.features
        if self.split_scores is not None:
            arrays["split_scores"] = np.array(self.split_scores)
        arrays["about"] = np.array(json.dumps({"version": VERSION, **self.about}))
        # not np.savez, which leaves the file open when the disk is full
        with write_whole(file) as part, zipfile.ZipFile(part, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)

    @classmethod
    def load(cls, file: Path) -> "FeatureSet":
        """Reads the moments that `file` holds, ours or not, and what else of ours is there.

        Raises:
            UserError: it is damaged, holds pickles, or no moments of features.
        """
        with open_npz(file) as npz:
            there = set(npz.files)
            if not {"mu", "sigma"} <= there:
                raise UserError(
                    f"{file} holds {', '.join(sorted(there)) or 'nothing'} and no statistics of "
                    "features (mu, sigma): write one with `python -m tarflow_dist.reference`"
                )
            pooled = _gaussian(file, npz["mu"], npz["sigma"])
            spatial = _gaussian(file, npz["mu_s"], npz["sigma_s"]) if "mu_s" in there else None
            features = npz["features"] if "features" in there else None
            scores = npz["split_scores"] if "split_scores" in there else None
            about = json.loads(str(npz["about"])) if "about" in there else {}
        if features is not None:
            _check_numbers(file, "features", features)
            if features.ndim != 2 or features.shape[1] != len(pooled.mean) or not len(features):
                raise UserError(
                    f"{file} holds features {features.shape} and moments of {len(pooled.mean)}"
                )
        if scores is not None:
            _check_numbers(file, "split_scores", scores)
            scores = scores.ravel().tolist()
        return cls(pooled, spatial, features, scores, {"count": None} | _checked(file, about))


def _checked(file: Path, about: Any) -> dict[str, Any]:
    """`about`, if what is read of it is of its kind.

    Raises:
        UserError: it isn't.
    """
    kinds = {"count": int, "features": str, "features_sha256": str}
    kinds_in_lists = {"class_names": str, "class_counts": int, "image_shape": int}
    if (
        not isinstance(about, dict)
        or any(not isinstance(about.get(name), kind | None) for name, kind in kinds.items())
        or any(not isinstance(about.get(name), list | None) for name in kinds_in_lists)
        or any(
            not isinstance(part, kind)
            for name, kind in kinds_in_lists.items()
            for part in about.get(name) or ()
        )
    ):
        raise UserError(f"{file} says of itself what makes no sense: write it again")
    try:
        take_version(about, newest=VERSION)
    except ValueError as error:
        raise UserError(f"{file} is of {error}") from error
    return about


def _gaussian(file: Path, mean: NDArray, covariance: NDArray) -> Gaussian:
    for name, array in (("mean", mean), ("covariance", covariance)):
        _check_numbers(file, name, array)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{file} is no file of statistics: its mean is {mean.shape} and its covariance "
            f"{covariance.shape}"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    variance = np.diag(covariance)
    largest = np.sqrt(np.outer(variance, variance).clip(min=0)) * 1.001 + 1e-9
    if (
        (variance < 0).any()
        or (abs(covariance) > largest).any()
        or not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-9)
    ):
        raise UserError(
            f"{file} holds no covariance: one is symmetric, with variances of 0 or more, and no "
            "value above what they allow"
        )
    return Gaussian(mean, covariance)


def _check_numbers(file: Path, name: str, array: NDArray) -> None:
    if array.dtype.kind not in "fiu":
        raise UserError(f"{file}: its {name} are {array.dtype}, and not real numbers")
    if not (abs(array.astype(np.float64)) < LARGEST).all():
        raise UserError(f"{file} holds {name} that are not finite, or out of all bounds")
