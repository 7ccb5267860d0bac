"""An image set as its features describe it, and the .npz files that hold such descriptions: ours,
ADM's and pytorch-fid's. Nothing is unpickled."""

import json
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
from tarflow_dist.files import write_whole

IMAGES = "arr_0"  # ADM's name for images in an .npz, uint8 (N, H, W, 3)


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
        arrays["about"] = np.array(json.dumps(self.about))
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
            about = json.loads(str(npz["about"])) if "about" in there else {}
            return cls(
                _gaussian(file, npz["mu"], npz["sigma"]),
                spatial=_gaussian(file, npz["mu_s"], npz["sigma_s"]) if "mu_s" in there else None,
                features=npz["features"] if "features" in there else None,
                split_scores=npz["split_scores"].tolist() if "split_scores" in there else None,
                about={"count": None} | about,
            )


def _gaussian(file: Path, mean: NDArray, covariance: NDArray) -> Gaussian:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{file} is no file of statistics: its mean is {mean.shape} and its covariance "
            f"{covariance.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{file} holds statistics that are not finite: write it again")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


@contextmanager
def open_npz(file: Path) -> Iterator[Any]:
    """The arrays of an .npz, none of them unpickled.

    Raises:
        UserError: it is missing, damaged, no .npz, or holds pickles.
    """
    try:
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


def image_shape(file: Path) -> tuple[int, ...] | None:
    """(N, H, W, C) of the images that an .npz of ADM's holds, or None where it holds none."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{IMAGES}.npy") as stream:
            return _read_header(stream)[0]
    except KeyError:
        return None


def image_batches(
    file: Path, batch_size: int, *, rank: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Rank's share of the images that an .npz of ADM's holds: their places (B,) and the images
    uint8 (B, H, W, C). Holds one batch in memory at a time."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{IMAGES}.npy") as stream:
        shape, dtype = _read_header(stream)
        size = int(np.prod(shape[1:]))
        for number, start in enumerate(range(0, shape[0], batch_size)):
            count = min(batch_size, shape[0] - start)
            data = stream.read(count * size)
            if number % world_size == rank:
                images = np.frombuffer(data, dtype).reshape(count, *shape[1:])
                yield np.arange(start, start + count), images


def _read_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = read(stream)
    if fortran_order or dtype != np.uint8 or len(shape) != 4:
        raise UserError(f"{IMAGES} is {dtype} {shape}, and images are uint8 (N, H, W, C)")
    return shape, dtype
