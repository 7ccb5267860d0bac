"""Where images come from: one small class a layout, each a stream of items in its own order."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from tarflow_dist.errors import UserError

SPLITS = ("train", "val")
DIGITS_SIZE = 8
IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


@dataclass(frozen=True, slots=True)
class Item:
    """One image before it is decoded. Small, and can be sent to another process."""

    split: str
    label: int
    name: str
    """Where it came from; no other image of the source has this name."""
    content: Path | bytes | np.ndarray
    """A file, a file's bytes, or pixels: uint8, (H, W) or (H, W, 3)."""


class Source(Protocol):
    """Images in a layout that users have. It is read once, from front to back, so an archive can
    be streamed; the order in which images are stored is made by the pipeline."""

    name: str
    """For file names: letters, digits, - and _."""
    channels: int
    """Of the images once prepared: 1 for grey, 3 for RGB."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; a label is a position in them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, 1,500 to train and 297 to validate."""

    name = "digits"
    classes = tuple("0123456789")
    channels = 1

    def __init__(self, *, seed: int):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        values, self._labels = load_digits(return_X_y=True)
        self._pixels = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
        _, val = train_test_split(
            np.arange(len(values)), test_size=297, stratify=self._labels, random_state=seed
        )
        self._val = frozenset(val.tolist())

    def __len__(self) -> int:
        return len(self._pixels)

    def __iter__(self) -> Iterator[Item]:
        for i, (pixels, label) in enumerate(zip(self._pixels, self._labels, strict=True)):
            split = "val" if i in self._val else "train"
            yield Item(split, int(label), f"digits/{i:04d}", pixels)


class Folder:
    """A folder of class folders, images at any depth below them: SRC/CLASS/…/IMAGE, split here, or
    SRC/{train,val}/CLASS/…/IMAGE, split as it lies. Folders without images are no classes.

    Raises:
        UserError: `path` is no such folder.
    """

    channels = 3

    def __init__(self, path: Path, *, val_fraction: float, seed: int):
        if not path.is_dir():
            raise UserError(f"there is no folder {path}: give a folder of class folders")
        self.name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.resolve().name) or "images"
        self._path = path
        if all((path / split).is_dir() for split in SPLITS):
            found = {split: _images_by_class(path / split) for split in SPLITS}
            if unknown := sorted(set(found["val"]) - set(found["train"])):
                raise UserError(f"{path / 'val'} has a class that train lacks: {unknown[0]}")
        else:
            images = _images_by_class(path)
            if set(images) == {"train"}:
                raise UserError(f"{path} has train/ but no val/: give {path / 'train'} to split it")
            found = self._split(images, val_fraction, seed)
        self.classes = sorted(found["train"])
        self._files = [
            (split, label, file)
            for split in SPLITS
            for label, name in enumerate(self.classes)
            for file in found[split].get(name, ())
        ]

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Item]:
        for split, label, file in self._files:
            yield Item(split, label, self._name_of(file), file)

    def _name_of(self, file: Path) -> str:
        return _readable(file.relative_to(self._path).as_posix())

    def _split(
        self, images: dict[str, list[Path]], val_fraction: float, seed: int
    ) -> dict[str, dict[str, list[Path]]]:
        """Holds out `val_fraction` of each class, but at least one image where a class has two."""
        found: dict[str, dict[str, list[Path]]] = {split: {} for split in SPLITS}
        for name, files in images.items():
            drawn = sorted(files, key=lambda file: shuffle_key(seed, "split", self._name_of(file)))
            count = min(max(1, round(len(files) * val_fraction)), len(files) - 1)
            found["val"][name], found["train"][name] = drawn[:count], sorted(drawn[count:])
        if not any(found["val"].values()):
            raise UserError(f"no class of {self._path} has two images, so val would be empty")
        return found


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files below each folder in `folder`, sorted. Hidden files and folders are left out.

    Raises:
        UserError: there are none, or a folder can't be read.
    """
    found = {}
    try:
        for class_folder in sorted(folder.iterdir()):
            if not class_folder.name.startswith(".") and class_folder.is_dir():
                files = _images_below(class_folder)
                if files:
                    found[_readable(class_folder.name)] = files
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror}") from error
    if not found:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{folder} has no class folders with images in them ({known})")
    return found


def _images_below(folder: Path) -> list[Path]:
    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if _is_image(name)]
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _readable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 become replacement characters."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def shuffle_key(seed: int, purpose: str, name: str) -> bytes:
    """Sorting names by this shuffles them, each in its place whatever else is among them."""
    return blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=16).digest()
