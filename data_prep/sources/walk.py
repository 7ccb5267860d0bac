"""Walks through folders of images: which files are images, and what else lies there."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data_prep.images import is_image
from data_prep.sources.base import Group, check_distinct, is_image_name, kind_of, readable
from tarflow_dist.errors import UserError


class Images(NamedTuple):
    """The images in a folder."""

    path: Path
    names: list[str]
    """Paths of the images in it, sorted."""
    absent: frozenset[str]
    """Those of them that are links to nothing."""
    passed_over: Counter[str]
    """What else lies there, by its kind."""

    def group(self, split: str, label: int, prefix: str) -> Group:
        return Group(split, label, prefix, self.path, self.names, absent=self.absent)


class ClassFolders(NamedTuple):
    """What lies in a folder of class folders, or of pictures without classes."""

    classes: dict[str, Images]
    """By the class's name."""
    loose: Images
    """Beside the class folders."""
    empty: list[str]
    """Folders without images, which are no classes."""

    @property
    def passed_over(self) -> Counter[str]:
        total = self.loose.passed_over.copy()
        for images in self.classes.values():
            total += images.passed_over
        return total


def class_folders(folder: Path) -> ClassFolders:
    """What lies in `folder`. Hidden files and folders are passed over.

    Raises:
        UserError: two of the folders have one name, or one can't be read.
    """
    found, empty = {}, []
    try:
        loose = images_in(folder, deep=False)
        names = folders_in(folder)
        check_distinct(names, f"{folder} has two class folders")
        for name in names:
            images = images_in(folder / name)
            if images.names:
                found[readable(name)] = images
            else:
                empty.append(readable(name))
                loose.passed_over.update(images.passed_over)
    except OSError as error:
        raise unreadable(error) from error
    return ClassFolders(found, loose, empty)


def images_in(folder: Path, *, deep: bool = True) -> Images:
    """What lies in a folder, and, if `deep`, below it. Links to folders are followed, but not in
    circles.

    A file is an image by its suffix, or else by its content.

    Raises:
        OSError: something can't be read.
    """
    names: list[str] = []
    absent: set[str] = set()
    passed_over: Counter[str] = Counter()

    def search(path: str, inside: str, above: frozenset[tuple[int, int]]) -> None:
        about = os.stat(path)
        here = (about.st_dev, about.st_ino)
        if here in above:
            return
        with os.scandir(path) as entries:
            for entry in entries:
                name = inside + entry.name
                if entry.is_dir() and not entry.name.startswith("."):
                    if deep:
                        search(entry.path, f"{name}/", above | {here})
                elif is_image_name(name) or (
                    not entry.name.startswith(".")
                    and os.path.exists(entry.path)
                    and is_image(Path(entry.path))
                ):
                    names.append(name)
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        absent.add(name)
                else:
                    passed_over[kind_of(name)] += 1

    search(str(folder), "", frozenset())
    return Images(folder, sorted(names), frozenset(absent), passed_over)


def folders_in(path: Path) -> list[str]:
    """The names of the folders in `path`, sorted, without hidden ones."""
    return sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def unreadable(error: OSError) -> UserError:
    """What a user is told of a file or folder that the system refuses."""
    return UserError(f"can't read {error.filename}: {error.strerror}")
