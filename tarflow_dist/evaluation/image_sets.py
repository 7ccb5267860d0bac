"""Sets of images, wherever they lie, as features are measured on them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_prep.images import open_image, to_8bit
from tarflow_dist.data.loader import eval_batches
from tarflow_dist.data.shards import Shards
from tarflow_dist.distributed import rank, world_size
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation import npz
from tarflow_dist.evaluation.sample_store import NO_LABEL, SETTINGS_FILE, Pixels, SampleStore
from tarflow_dist.files import sha256

NUM_WORKERS = 2
"""Processes a rank that read and decode a data set."""

ImageShape = tuple[int, int, int]
"""(C, H, W)."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""Image indexes (B,) and uint8 images (B, C, H, W)."""


class ImageSet(Protocol):
    """Images of one shape, with indexes from 0 on."""

    @property
    def image_shape(self) -> ImageShape: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Batches:
        """This rank's share of the images."""
        ...

    def images(self, indexes: Sequence[int]) -> Pixels:
        """uint8 (len(indexes), H, W, C)."""
        ...


class Samples(ImageSet, Protocol):
    """Images that some model drew."""

    def labels(self) -> NDArray[np.int64]:
        """(N,), −1 for none."""
        ...

    def sha256(self) -> str: ...


def open_samples(path: Path) -> Samples:
    """The samples at `path`: a folder of `sample_fid`'s, an .npz of ADM's, or a folder of pictures.

    Raises:
        UserError: there is no such thing.
    """
    if path.is_file():
        return NpzImages(path)
    if not (path / SETTINGS_FILE).exists():
        return FolderImages(path)
    store = SampleStore.open(path)
    if missing := store.missing_chunks():
        raise UserError(f"{path} lacks {len(missing)} of its chunks: draw them first")
    return store


class ShardImages:
    """A data set's images as they are stored: no flips, no crops."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self.image_shape: ImageShape = shards.image_shape

    def __len__(self) -> int:
        return len(self._shards)

    def batches(self, batch_size: int) -> Batches:
        batches = eval_batches(
            self._shards,
            batch_size=batch_size,
            rank=rank(),
            world_size=world_size(),
            num_workers=NUM_WORKERS,
        )
        return ((batch.index, batch.images) for batch in batches)

    def images(self, indexes: Sequence[int]) -> Pixels:
        return np.stack([self._shards[index][0].transpose(1, 2, 0) for index in indexes])


class NpzImages:
    """The images in an .npz of ADM's, which has grey ones in three channels.

    Args:
        channels: of those, one is given if this is 1; None gives what is there.

    Raises:
        UserError: the file holds no images; later, if one channel is wanted, that they aren't grey.
    """

    def __init__(self, file: Path, channels: int | None = None):
        with npz.open_npz(file) as arrays:
            stored = npz.shape_of_images(file)
            labels = arrays[npz.LABELS] if npz.LABELS in arrays.files else None
        if stored is None:
            raise UserError(f"{file} holds no images ({npz.IMAGES})")
        self._file, self._count = file, stored[0]
        self._labels = labels
        grey = channels == 1 and stored[3] == 3
        self.image_shape: ImageShape = (1 if grey else stored[3], stored[1], stored[2])

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int) -> Batches:
        for index, images in npz.image_batches(
            self._file, batch_size, rank=rank(), world_size=world_size()
        ):
            yield torch.from_numpy(index), torch.tensor(self._pixels(images)).permute(0, 3, 1, 2)

    def images(self, indexes: Sequence[int]) -> Pixels:
        wanted = {index: place for place, index in enumerate(indexes)}
        C, H, W = self.image_shape
        found = np.empty((len(indexes), H, W, C), np.uint8)
        for index, images in npz.image_batches(self._file, 1, rank=0, world_size=1):
            if (place := wanted.pop(int(index[0]), None)) is not None:
                found[place] = self._pixels(images)[0]
            if not wanted:
                break
        return found

    def labels(self) -> NDArray[np.int64]:
        if self._labels is None or self._labels.shape != (self._count,):
            return np.full(self._count, NO_LABEL)
        return self._labels.astype(np.int64)

    def sha256(self) -> str:
        return sha256(self._file)

    def _pixels(self, images: Pixels) -> Pixels:
        channels = self.image_shape[0]
        if channels == 1 and (images != images[..., :1]).any():
            raise UserError(f"{self._file} holds colour images and the model's are grey")
        return images[..., :channels]


class FolderImages:
    """The pictures in a folder and those below it, in the order of their paths: all grey if the
    first is, or else RGB.

    Raises:
        UserError: there are fewer than two; later, that one can't be read or is of another size.
    """

    def __init__(self, folder: Path):
        known = Image.registered_extensions()
        files = folder.rglob("*")
        self._files = sorted(file for file in files if file.suffix.lower() in known)
        if len(self._files) < 2:
            raise UserError(f"{folder} holds {len(self._files)} pictures: two or more are needed")
        with open_picture(self._files[0]) as first:
            self._channels = 1 if first.mode in ("1", "L", "I;16") else 3
            self.image_shape: ImageShape = (self._channels, first.height, first.width)

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(rank() * batch_size, len(self), world_size() * batch_size):
            index = range(start, min(start + batch_size, len(self)))
            yield torch.tensor(index), torch.from_numpy(self.images(index)).permute(0, 3, 1, 2)

    def images(self, indexes: Sequence[int]) -> Pixels:
        _, height, width = self.image_shape
        found = np.empty((len(indexes), height, width, self._channels), np.uint8)
        for place, index in enumerate(indexes):
            image = self._read(index)
            if image.shape != found.shape[1:]:
                raise UserError(
                    f"{self._files[index]} is {image.shape[1]}×{image.shape[0]} and "
                    f"{self._files[0]} is {width}×{height}: they should be of one size"
                )
            found[place] = image
        return found

    def labels(self) -> NDArray[np.int64]:
        return np.full(len(self), NO_LABEL)

    def sha256(self) -> str:
        return sha256(*self._files)

    def _read(self, index: int) -> Pixels:
        with open_picture(self._files[index]) as image:
            pixels = np.asarray(to_8bit(image, self._channels))
        return pixels.reshape(*pixels.shape[:2], self._channels)


@contextmanager
def open_picture(file: Path) -> Iterator[Image.Image]:
    """Opens a user's picture.

    Raises:
        UserError: it can't be read, here or in the body.
    """
    try:
        with open_image(file.read_bytes()) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's are of every kind
        raise UserError(f"{file} is no image that can be read: {error}") from error


def check_image_shape(
    folder: Path | str, shape: tuple[int, int, int], image_shape: tuple[int, int, int]
) -> None:
    """Raises `UserError` if the images of `folder` are of another `shape` (C, H, W) than the
    model's."""
    if shape != image_shape:
        there, wanted = ("×".join(map(str, s)) for s in (shape, image_shape))
        raise UserError(
            f"the images of {folder} are {there} and the model's are {wanted} (channels × height × "
            "width): prepare a set of that size with data_prep"
        )
