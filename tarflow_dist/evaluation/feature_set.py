"""An image set as its features describe it, and the .npz files that hold such descriptions: ours,
ADM's and pytorch-fid's. Nothing is unpickled."""

import json
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.statistics import Gaussian
from tarflow_dist.files import regular, take_version, write_whole

IMAGES = "arr_0"  # ADM's name for images in an .npz, uint8 (N, H, W, 3)


VERSION = 1  # of our own files
LARGEST = 1e60  # that a feature or a moment may be: squares of it are still numbers


@dataclass(frozen=True)
class FeatureSet:
    """What is left of an image set to compare it with others.

    Attributes:
        pooled: moments of the features.
        spatial: moments of the spatial features, for sFID; None where there are none.
        features: float32 (K, F) of K of the images, in order; None where there are none.
        split_scores: the Inception Score of each of ten splits; None without class scores.
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
    kinds = {
        "count": int,
        "features": str,
        "features_sha256": str,
        "class_names": list,
        "image_shape": list,
    }
    if not isinstance(about, dict) or any(
        not isinstance(about.get(name), kind | None) for name, kind in kinds.items()
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


@contextmanager
def open_npz(file: Path) -> Iterator[Any]:
    """The arrays of an .npz, none of them unpickled.

    Raises:
        UserError: it is missing, damaged, no .npz, or holds pickles.
    """
    try:
        regular(file)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    try:
        _check_sizes(file)
        with np.load(file, allow_pickle=False) as npz:
            if not isinstance(npz, np.lib.npyio.NpzFile):
                raise UserError(f"{file} is a single array and no .npz")
            yield npz
    except UserError:
        raise
    except Exception as error:  # whatever damage does to a parser
        if not zipfile.is_zipfile(file):
            reason = "is no .npz, or damaged"
        else:
            reason = "holds pickled objects" if "pickle" in str(error).lower() else "is damaged"
        raise UserError(
            f"{file} {reason}, and is not opened: give an .npz of statistics, such as `python -m "
            "tarflow_dist.reference` writes or ADM's VIRTUAL_*.npz"
        ) from error


def _check_sizes(file: Path) -> None:
    """Raises `ValueError` if an array is said to be larger than what there is of it: it would be
    made room for first."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                shape, _, dtype = _read_header(stream)
                if dtype.hasobject:
                    raise ValueError(f"{member.filename} is pickled")
                if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
                    raise ValueError(f"{member.filename} is not as long as it says")


def image_shape(file: Path) -> tuple[int, ...] | None:
    """(N, H, W, C) of the images that an .npz of ADM's holds, or None where it holds none."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{IMAGES}.npy") as stream:
            shape, fortran_order, dtype = _read_header(stream)
    except KeyError:
        return None
    if fortran_order or dtype != np.uint8 or len(shape) != 4:
        raise UserError(f"{file}: {IMAGES} is {dtype} {shape}, and images are uint8 (N, H, W, C)")
    if shape[0] < 2:
        raise UserError(f"{file} holds {shape[0]} images, and a comparison needs two or more")
    return shape


def image_batches(
    file: Path, batch_size: int, *, rank: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Rank's share of the images that an .npz of ADM's holds: their places (B,) and the images
    uint8 (B, H, W, C). Holds one batch in memory at a time."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{IMAGES}.npy") as stream:
        shape, _, dtype = _read_header(stream)
        size = int(np.prod(shape[1:]))
        for number, start in enumerate(range(0, shape[0], batch_size)):
            count = min(batch_size, shape[0] - start)
            data = stream.read(count * size)
            if number % world_size == rank:
                images = np.frombuffer(data, dtype).reshape(count, *shape[1:])
                yield np.arange(start, start + count), images


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran's order, and type of the array that follows."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
