"""What a distance between image sets is measured on. An extractor is one small class here, and a
line in `make_extractor`. Importing this loads no torch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tarflow_dist.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXTRACTORS = ("inception", "pixels")


class Features(NamedTuple):
    """What an extractor sees in B images."""

    pooled: Tensor
    """(B, F): what distances, precision and recall, and neighbours are measured on."""
    spatial: Tensor | None = None
    """(B, S): a second distance that sees where things are, sFID."""
    logits: Tensor | None = None
    """(B, K): scores of K classes, for the Inception Score."""


class FeatureExtractor(Protocol):
    """uint8 images (B, C, H, W), on the device where it was made → their features."""

    name: str
    """Says in a result what it was measured on."""
    weights_sha256: str | None
    """And with which weights; None if it has none."""
    dim: int
    """F."""
    spatial_dim: int
    """S; 0 if there are no spatial features."""

    def __call__(self, images: Tensor) -> Features: ...


def make_extractor(
    name: str,
    image_shape: tuple[int, int, int],
    inception_weights: Path | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """The extractor called `name`, one of `EXTRACTORS`, for images of `image_shape` (C, H, W), with
    the weights that `check_features` found there."""
    if name == "pixels":
        return PixelFeatures(image_shape)
    assert inception_weights is not None
    return InceptionFeatures(inception_weights, device)


class PixelFeatures:
    """The pixels themselves, k/127.5 − 1 in float64: for tiny images, such as the digits.

    Args:
        image_shape: C, H, W.
    """

    name = "pixels"
    weights_sha256: str | None = None
    spatial_dim = 0
    MAX_DIM = 4096  # the covariance and its roots grow as dim² and dim³

    def __init__(self, image_shape: tuple[int, int, int]):
        channels, height, width = image_shape
        self.dim = channels * height * width
        if self.dim > self.MAX_DIM:
            raise UserError(
                f"pixels as features are for images of up to {self.MAX_DIM} values, and these have "
                f"{self.dim}: use inception"
            )

    def __call__(self, images: Tensor) -> Features:
        return Features((images.double() / 127.5 - 1).flatten(1))


class InceptionFeatures:
    """The Inception v3 that FID is defined on (arXiv 1706.08500), by torch-fidelity, whose resize
    equals TensorFlow 1's. Grey images are repeated to three channels.

    Pooled are its 2048 last features. Spatial are ADM's for sFID (arXiv 2103.03841): the first
    7 channels of the 17×17 layer mixed_6/conv, 2023 values, rows first and channels last. Logits
    are those without the bias, as in all published Inception Scores.

    Args:
        weights: pytorch-fid's file, or torch-fidelity's.
        device: where it runs.

    Raises:
        UserError: the file is damaged, holds more than tensors, or is of another network.
    """

    name = "inception-v3-2048"
    dim = 2048
    spatial_dim = 17 * 17 * 7

    def __init__(self, weights: Path, device: torch.device | str = "cpu"):
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            content = weights.read_bytes()
            tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on the damage
            raise UserError(
                f"{weights} is damaged, or holds more than tensors and is not opened: {_WANTED}"
            ) from error
        # torch-fidelity unpickles whatever it is given, so it gets a copy of what loaded safely.
        copy = io.BytesIO()
        torch.save(tensors, copy)
        copy.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                self.name,
                [str(self.dim), "logits_unbiased"],
                feature_extractor_weights_path=copy,
            )
        except (RuntimeError, TypeError) as error:  # from load_state_dict
            raise UserError(
                f"{weights} holds other weights than FID's Inception v3: {_WANTED}"
            ) from error
        self.weights_sha256: str | None = hashlib.sha256(content).hexdigest()
        self._network = network.to(device)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, layer: Any, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def __call__(self, images: Tensor) -> Features:
        import torch

        if images.shape[1] == 1:
            images = images.repeat(1, 3, 1, 1)
        # Convolutions run in TF32 by default, which keeps three digits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pooled, logits = self._network(images)
        return Features(pooled, self._spatial, logits)


_WANTED = (
    "give --inception-weights the file pt_inception-2015-12-05-6726825d.pth (pytorch-fid's) or "
    "weights-inception-2015-12-05-6726825d.pth (torch-fidelity's)"
)


def check_features(names: Sequence[str], inception_weights: Path | None) -> None:
    """Raises `UserError` if the extractors `names` lack the weights that they need, or don't take
    the given."""
    if "inception" not in names and inception_weights is not None:
        raise UserError(
            f"--features {','.join(names)} takes no --inception-weights: leave one of them out"
        )
    if "inception" in names and inception_weights is None:
        raise UserError(f"Inception features need their weights on disk: {_WANTED}")
    if inception_weights is not None and not inception_weights.is_file():
        raise UserError(f"{inception_weights} is not a file: {_WANTED}")
