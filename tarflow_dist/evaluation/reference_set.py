"""What samples are compared with: a data set, or what a file knows of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow_dist.data.shards import open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.features import FeatureExtractor
from tarflow_dist.evaluation.image_sets import (
    IMAGES,
    ImageSet,
    ImageShape,
    NpzImages,
    ShardImages,
    check_image_shape,
    open_npz,
)
from tarflow_dist.files import sha256

KEPT_FEATURES = 10_000
"""Images of a data set whose features are kept for precision, recall and the kernel distance: as
many as ADM's references hold."""


@dataclass(frozen=True)
class Reference:
    """Images, or statistics of them, or of each something: ADM's files hold the statistics of a
    whole set, and some images for precision and recall.

    Attributes:
        about: what a result says of it, as JSON values: where it lies, the split of a data set, how
            many images it stands for (None where a file doesn't tell), and the SHA-256 of the data
            set's manifest or of the file.
        class_counts: images of each class; None where a file doesn't tell.
        keep: images whose features are kept.
    """

    about: dict[str, Any]
    class_names: list[str] | None
    class_counts: tuple[int, ...] | None = None
    images: ImageSet | None = None
    statistics: FeatureSet | None = None
    keep: int = KEPT_FEATURES


def _about(path: str, split: str | None, count: int | None, sha256: str) -> dict[str, Any]:
    keys = ("reference", "reference_split", "reference_images", "reference_sha256")
    return dict(zip(keys, (path, split, count, sha256), strict=True))


def open_reference(
    path: str,
    split: str,
    *,
    image_shape: ImageShape,
    num_classes: int,
    extractors: Sequence[FeatureExtractor],
) -> Reference:
    """`path` is a set that data_prep wrote, or an .npz file: one that `tarflow_dist.reference`
    wrote, ADM's (VIRTUAL_*.npz: moments and images; or images alone), or pytorch-fid's (moments).

    Args:
        image_shape: (C, H, W) of the images that will be compared with it.
        num_classes: of the model that draws them; 0 if it has none.

    Raises:
        UserError: there is no such thing, it is damaged, or of other images, classes or features.
    """
    if "://" not in path and Path(path).is_file():
        reference = _open_file(Path(path), image_shape, extractors)
    else:
        reference = open_shards_reference(path, split)
        assert reference.images is not None
        check_image_shape(path, reference.images.image_shape, image_shape)
    names = reference.class_names
    if num_classes and names is not None and len(names) != num_classes:
        raise UserError(
            f"{path} holds {len(names)} classes, and the model has {num_classes}: give the "
            "reference that it was made for"
        )
    return reference


def open_shards_reference(path: str, split: str, keep: int = KEPT_FEATURES) -> Reference:
    """A split of a set that data_prep wrote: every image once, as it is stored."""
    shards = open_shards(path, split)
    return Reference(
        _about(path, split, len(shards), sha256(shards.manifest)),
        shards.classes.shown,
        tuple(shards.class_counts),
        images=ShardImages(shards),
        keep=keep,
    )


def _open_file(
    file: Path, image_shape: ImageShape, extractors: Sequence[FeatureExtractor]
) -> Reference:
    with open_npz(file) as arrays:
        there = arrays.files
    images = NpzImages(file, image_shape[0]) if IMAGES in there else None
    if images is not None:
        # grey ones may be repeated, and are compared in three channels
        channels = images.image_shape[0] if image_shape[0] == 1 else 3
        check_image_shape(file, images.image_shape, (channels, *image_shape[1:]))
    statistics = FeatureSet.load(file) if "mu" in there or images is None else None
    if statistics is not None:
        for extractor in extractors:
            _check(file, statistics, image_shape, extractor)
    count = 0 if images is None else len(images)
    about: dict[str, Any] = {"count": count} if statistics is None else statistics.about
    return Reference(
        _about(str(file), None, about["count"], sha256(file)),
        about.get("class_names"),
        tuple(about["class_counts"]) if about.get("class_counts") else None,
        images,
        statistics,
        keep=count,
    )


def _check(
    file: Path, stored: FeatureSet, image_shape: ImageShape, extractor: FeatureExtractor
) -> None:
    about, dim = stored.about, len(stored.pooled.mean)
    if "image_shape" in about:
        check_image_shape(file, tuple(about["image_shape"]), image_shape)
    if dim != extractor.dim or about.get("features", extractor.name) != extractor.name:
        raise UserError(
            f"{file} holds {dim} features ({about.get('features', 'whose is not said')}) "
            f"and the samples are measured with {extractor.dim} ({extractor.name}): choose "
            "--features to match, or another reference"
        )
    if about.get("features_sha256", extractor.weights_sha256) != extractor.weights_sha256:
        raise UserError(
            f"{file} was measured with other weights of {extractor.name}: give those, or "
            "write the reference again"
        )
