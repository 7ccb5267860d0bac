"""Class folders."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data_prep.sources.base import (
    IMAGE_SUFFIXES,
    Group,
    Grouped,
    check_distinct,
    is_image,
    readable,
    shuffle_key,
)
from tarflow_dist.errors import UserError

VAL_NAMES = ("val", "valid", "validation", "test")  # the first that is there is the val split


class ClassFolder(NamedTuple):
    """The images of a class."""

    path: Path
    names: list[str]
    """Paths of the images in it, sorted."""
    absent: frozenset[str]
    """Those of them that are links to nothing."""

    def group(self, split: str, label: int, prefix: str) -> Group:
        return Group(split, label, prefix, self.path, self.names, absent=self.absent)


class Folder(Grouped):
    """A folder of class folders, images at any depth below them: SRC/CLASS/…/IMAGE, split here, or
    SRC/{train,val}/CLASS/…/IMAGE, split as it lies; val/ may be called as in VAL_NAMES. Folders
    without images are no classes.

    Args:
        val_fraction: share of each class held out where SRC is not split.

    Raises:
        UserError: `path` is no such folder.
    """

    def __init__(self, path: Path, *, val_fraction: float, seed: int):
        val = next((name for name in VAL_NAMES if (path / name).is_dir()), "")
        split_here = not val or not (path / "train").is_dir()
        if split_here:
            found = {"": images_by_class(path)}
            if set(found[""]) == {"train"}:
                raise UserError(f"{path} has train/ but no val/: give {path / 'train'} to split it")
        else:
            found = {"train": images_by_class(path / "train"), "val": images_by_class(path / val)}
            if unknown := sorted(set(found["val"]) - set(found["train"])):
                raise UserError(f"{path / val} has a class that train lacks: {unknown[0]}")
        classes = sorted(found["" if split_here else "train"])
        above = {"": "", "train": "train/", "val": f"{val}/"}
        groups = [
            found[split][class_name].group(split, label, f"{above[split]}{class_name}/")
            for split in found
            for label, class_name in enumerate(classes)
            if class_name in found[split]
        ]
        if split_here:
            halves = [_hold_out(group, val_fraction, seed) for group in groups]
            if not any(val.names for _, val in halves):
                raise UserError(f"no class of {path} has two images, so val would be empty")
            groups = [half for pair in zip(*halves, strict=True) for half in pair]
        super().__init__("folder", path, classes, groups)


def _hold_out(group: Group, fraction: float, seed: int) -> tuple[Group, Group]:
    """Train and val; `fraction` of it for val, but at least one image where there are two."""
    drawn = sorted(
        group.names, key=lambda name: shuffle_key(seed, "split", group.prefix + readable(name))
    )
    count = min(max(1, round(len(drawn) * fraction)), len(drawn) - 1)
    train, val = sorted(drawn[count:]), drawn[:count]
    return replace(group, split="train", names=train), replace(group, split="val", names=val)


def images_by_class(folder: Path) -> dict[str, ClassFolder]:
    """The folders in `folder` with images below them, by their readable names. Hidden files and
    folders are left out.

    Raises:
        UserError: there are none, two of the folders have one name, or one can't be read.
    """
    found = {}
    folders = []
    try:
        for class_folder in sorted(folder.iterdir()):
            if not class_folder.name.startswith(".") and class_folder.is_dir():
                images = _images_below(class_folder)
                if images.names:
                    folders.append(class_folder.name)
                    found[readable(class_folder.name)] = images
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror}") from error
    check_distinct(folders, f"{folder} has two class folders")
    if not found:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{folder} has no class folders with images in them ({known})")
    return found


def _images_below(folder: Path) -> ClassFolder:
    """Links to folders are followed, but not in circles."""
    names: list[str] = []
    absent: set[str] = set()

    def search(path: str, inside: str, above: frozenset[tuple[int, int]]) -> None:
        about = os.stat(path)
        here = (about.st_dev, about.st_ino)
        if here in above:
            return
        with os.scandir(path) as entries:
            for entry in entries:
                name = inside + entry.name
                if entry.is_dir() and not entry.name.startswith("."):
                    search(entry.path, f"{name}/", above | {here})
                elif is_image(entry.name):
                    names.append(name)
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        absent.add(name)

    search(str(folder), "", frozenset())
    return ClassFolder(folder, sorted(names), frozenset(absent))
