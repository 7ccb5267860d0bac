"""Sets of images, wherever they lie, as features are measured on them."""

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data_prep.images import open_image, to_8bit
from tarflow_dist.data.loader import eval_batches
from tarflow_dist.data.shards import Shards
from tarflow_dist.distributed import rank, world_size
from tarflow_dist.errors import UserError
from tarflow_dist.files import read_npy_header, regular, sha256

NUM_WORKERS = 2
"""Processes a rank that read and decode a data set."""
NO_LABEL = -1
IMAGES, LABELS = "arr_0", "arr_1"
"""ADM's names in an .npz for images, uint8 (N, H, W, C), and their labels (N,)."""

Pixels = NDArray[np.uint8]
ImageShape = tuple[int, int, int]
"""(C, H, W)."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""Image indexes (B,) and uint8 images (B, C, H, W)."""


class ImageSet(ABC):
    """Images of one shape, with indexes from 0 on."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def image_shape(self) -> ImageShape:
        height, width, channels = self.images([0]).shape[1:]
        return channels, height, width

    @abstractmethod
    def images(self, indexes: Sequence[int]) -> Pixels:
        """uint8 (len(indexes), H, W, C)."""

    def batches(self, batch_size: int) -> Batches:
        """This rank's share of the images."""
        for start in range(rank() * batch_size, len(self), world_size() * batch_size):
            index = range(start, min(start + batch_size, len(self)))
            yield torch.tensor(index), torch.from_numpy(self.images(index)).permute(0, 3, 1, 2)


class Samples(ImageSet):
    """Images that some model drew."""

    about: dict[str, Any]
    """What a result says of them, as JSON values; among it "seconds", that each stage took."""

    def labels(self) -> NDArray[np.int64]:
        """(N,), −1 for none."""
        return np.full(len(self), NO_LABEL)

    @abstractmethod
    def sha256(self) -> str:
        """Of the images."""


class ShardImages(ImageSet):
    """A data set's images as they are stored: no flips, no crops."""

    def __init__(self, shards: Shards):
        self._shards = shards

    @property
    def image_shape(self) -> ImageShape:
        return self._shards.image_shape

    def __len__(self) -> int:
        return len(self._shards)

    def images(self, indexes: Sequence[int]) -> Pixels:
        return np.stack([self._shards[index][0].transpose(1, 2, 0) for index in indexes])

    def batches(self, batch_size: int) -> Batches:
        batches = eval_batches(
            self._shards,
            batch_size=batch_size,
            rank=rank(),
            world_size=world_size(),
            num_workers=NUM_WORKERS,
        )
        return ((batch.index, batch.images) for batch in batches)


class NpzImages(Samples):
    """The images in an .npz of ADM's, which has grey ones in three channels. The file is never in
    memory as a whole.

    Args:
        channels: of those, one is given if this is 1; None gives what is there.

    Raises:
        UserError: the file holds no images; later, if one channel is wanted, that they aren't grey.
    """

    def __init__(self, file: Path, channels: int | None = None):
        with open_npz(file) as arrays:
            if IMAGES not in arrays.files:
                raise UserError(f"{file} holds no images ({IMAGES})")
            self._labels = arrays[LABELS] if LABELS in arrays.files else None
            archive = zipfile.ZipFile(file)
            stream = archive.open(f"{IMAGES}.npy")
            shape, fortran_order, dtype = read_npy_header(stream)
            if fortran_order or dtype != np.uint8 or len(shape) != 4:
                raise UserError(
                    f"{file}: {IMAGES} is {dtype} {shape}, and images are uint8 (N, H, W, C)"
                )
            if stream.tell() + math.prod(shape) != archive.getinfo(stream.name).file_size:
                raise ValueError("there are other than it says")
            if archive.testzip() is not None:  # its checksums, which parts of it don't reach
                raise ValueError("its images are damaged")
        self._file, self._stream, self._start = file, stream, stream.tell()
        self._count, self._height, self._width, self._stored_channels = shape
        if len(self) < 2:
            raise UserError(f"{file} holds {len(self)} images, and a comparison needs two or more")
        grey = channels == 1 and self._stored_channels == 3
        self._channels = 1 if grey else self._stored_channels

    @property
    def image_shape(self) -> ImageShape:
        return self._channels, self._height, self._width

    def __len__(self) -> int:
        return self._count

    def images(self, indexes: Sequence[int]) -> Pixels:
        shape = self._height, self._width, self._stored_channels
        size, found = math.prod(shape), []
        for index in indexes:
            self._stream.seek(self._start + index * size)
            found.append(np.frombuffer(self._stream.read(size), np.uint8))
        images = np.stack(found).reshape(-1, *shape)
        if self._channels == 1 and (images != images[..., :1]).any():
            raise UserError(f"{self._file} holds colour images and the model's are grey")
        return images[..., : self._channels]

    def labels(self) -> NDArray[np.int64]:
        if self._labels is None or self._labels.shape != (len(self),):
            return super().labels()
        return self._labels.astype(np.int64)

    def sha256(self) -> str:
        return sha256(self._file)


class FolderImages(Samples):
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
            self._size = to_8bit(first, self._channels).size

    def __len__(self) -> int:
        return len(self._files)

    def images(self, indexes: Sequence[int]) -> Pixels:
        return np.stack([self._read(self._files[index]) for index in indexes])

    def sha256(self) -> str:
        return sha256(*self._files)

    def _read(self, file: Path) -> Pixels:
        """(H, W, C)."""
        with open_picture(file) as image:
            upright = to_8bit(image, self._channels)
        if upright.size != self._size:
            there, first = (f"{width}×{height}" for width, height in (upright.size, self._size))
            raise UserError(
                f"{file} is {there} and {self._files[0]} is {first}: they should be of one size"
            )
        return np.asarray(upright).reshape(upright.height, upright.width, self._channels)


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
    except UnidentifiedImageError as error:  # whose words name no file, but an object
        raise UserError(f"{file} is not an image that Pillow knows") from error
    except Exception as error:  # Pillow's are of every kind
        raise UserError(f"{file} is no image that can be read: {error}") from error


@contextmanager
def open_npz(file: Path) -> Iterator[Any]:
    """The arrays of an .npz, images or statistics of features, none of them unpickled.

    Raises:
        UserError: it is missing, damaged, no .npz, or holds pickles.
    """
    try:
        regular(file)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
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


def check_image_shape(folder: Path | str, shape: ImageShape, image_shape: ImageShape) -> None:
    """Raises `UserError` if the images of `folder` are of another `shape` (C, H, W) than the
    model's."""
    if shape != image_shape:
        there, wanted = ("×".join(map(str, s)) for s in (shape, image_shape))
        raise UserError(
            f"the images of {folder} are {there} and the model's are {wanted} (channels × height × "
            "width): prepare a set of that size with data_prep"
        )
