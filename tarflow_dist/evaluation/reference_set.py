"""What samples are compared with: a data set whose images are at hand, or statistics in a file."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tarflow_dist.data.shards import open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation import feature_set
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.measure import (
    check_image_shape,
    describe_extractor,
    measure,
    npz_batches,
    shard_batches,
)
from tarflow_dist.evaluation.neighbours import Neighbours
from tarflow_dist.evaluation.store import Pixels
from tarflow_dist.files import read_json

KEPT_FEATURES = 10_000
"""Images of a reference whose features are kept for precision, recall and the kernel distance: as
many as ADM's references hold."""

ImageShape = tuple[int, int, int]


def open_reference(
    path: str,
    split: str,
    *,
    image_shape: ImageShape,
    num_classes: int,
    extractor: FeatureExtractor,
) -> "Reference":
    """`path` is a set that data_prep wrote, or an .npz file (`FileReference`).

    Args:
        image_shape: (C, H, W) of the images that will be compared with it.
        num_classes: of the model that draws them; 0 if it has none.

    Raises:
        UserError: there is no such thing, it is damaged, or of other images, classes or features.
    """
    reference: Reference
    if "://" not in path and Path(path).is_file():
        reference = FileReference(Path(path), image_shape=image_shape, extractor=extractor)
    else:
        reference = ShardsReference(path, split, image_shape=image_shape)
    names = reference.class_names
    if num_classes and names is not None and len(names) != num_classes:
        raise UserError(
            f"{path} holds {len(names)} classes, and the model has {num_classes}: give the "
            "reference that it was made for"
        )
    return reference


class ShardsReference:
    """A split of a set that data_prep wrote: every image once, as it is stored."""

    def __init__(self, path: str, split: str, *, image_shape: ImageShape | None = None):
        self._path, self._split = path, split
        self._shards = open_shards(path, split)
        self.image_shape = self._shards.image_shape
        if image_shape is not None:
            check_image_shape(path, self.image_shape, image_shape)
        summary = read_json(self._shards.manifest.with_name("summary.json"))
        words = summary.get("class_names")  # synonyms of WordNet's: the first is enough
        self.class_names: list[str] | None = (
            [names.partition(",")[0] for names in words] if words else summary["classes"]
        )

    def measure(
        self,
        extractor: FeatureExtractor,
        *,
        batch_size: int,
        device: torch.device,
        neighbours: Neighbours | None = None,
        keep: int = KEPT_FEATURES,
    ) -> FeatureSet | None:
        """Its features, on rank 0, and on the way the nearest `neighbours`. Collective."""
        return measure(
            shard_batches(self._shards, batch_size),
            extractor,
            label="reference",
            total=len(self._shards),
            keep=keep,
            device=device,
            neighbours=neighbours,
        )

    def describe(self) -> dict[str, Any]:
        """What a result says of it, as JSON values."""
        return {
            "reference": self._path,
            "reference_split": self._split,
            "reference_images": len(self._shards),
            "reference_sha256": sha256(self._shards.manifest),
        }

    def images(self, indexes: list[int]) -> Pixels:
        """uint8 (len(indexes), H, W, C)."""
        return np.stack([self._shards[index][0].transpose(1, 2, 0) for index in indexes])


class FileReference:
    """An .npz: one that `tarflow_dist.reference` wrote, ADM's (VIRTUAL_*.npz: moments, and images
    for precision and recall; or images alone), or pytorch-fid's (moments)."""

    def __init__(self, file: Path, *, image_shape: ImageShape, extractor: FeatureExtractor):
        self._file, self._channels = file, image_shape[0]
        with feature_set.open_npz(file) as npz:
            self._has_moments = "mu" in npz.files
            stored = feature_set.image_shape(file)
        if stored is not None:
            channels = image_shape[0] if stored[3] == image_shape[0] else 3  # grey, or repeated
            shape = (stored[3], stored[1], stored[2])
            check_image_shape(file, shape, (channels, *image_shape[1:]))
        self._stored = FeatureSet.load(file) if self._has_moments or stored is None else None
        self._images = stored[0] if stored is not None else 0
        about = self._stored.about if self._stored is not None else {}
        self.class_names = about.get("class_names")
        self._count = about["count"] if self._stored is not None else self._images
        if self._stored is not None:
            self._check(self._stored, image_shape, extractor)

    def _check(
        self, stored: FeatureSet, image_shape: ImageShape, extractor: FeatureExtractor
    ) -> None:
        about, dim = stored.about, len(stored.pooled.mean)
        if "image_shape" in about:
            check_image_shape(self._file, tuple(about["image_shape"]), image_shape)
        if dim != extractor.dim or about.get("features", extractor.name) != extractor.name:
            raise UserError(
                f"{self._file} holds {dim} features ({about.get('features', 'whose is not said')}) "
                f"and the samples are measured with {extractor.dim} ({extractor.name}): choose "
                "--features to match, or another reference"
            )
        if about.get("features_sha256", extractor.weights_sha256) != extractor.weights_sha256:
            raise UserError(
                f"{self._file} was measured with other weights of {extractor.name}: give those, or "
                "write the reference again"
            )

    def measure(
        self,
        extractor: FeatureExtractor,
        *,
        batch_size: int,
        device: torch.device,
    ) -> FeatureSet | None:
        """What it holds, and the features of its images. Collective."""
        if not self._images:
            return self._stored
        measured = measure(
            npz_batches(self._file, batch_size, self._channels),
            extractor,
            label="reference",
            total=self._images,
            keep=self._images,
            device=device,
        )
        if self._stored is None or measured is None:
            return measured
        return FeatureSet(
            self._stored.pooled, self._stored.spatial, measured.features, about=self._stored.about
        )

    def describe(self) -> dict[str, Any]:
        return {
            "reference": str(self._file),
            "reference_split": None,
            "reference_images": self._count,
            "reference_sha256": sha256(self._file),
        }


Reference = ShardsReference | FileReference


def describe_reference(reference: ShardsReference, extractor: FeatureExtractor) -> dict[str, Any]:
    """What a file of statistics says of itself."""
    return {
        **reference.describe(),
        **describe_extractor(extractor),
        "image_shape": list(reference.image_shape),
        "class_names": reference.class_names,
    }


def sha256(*files: Path) -> str:
    """The digest of the files' bytes one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
