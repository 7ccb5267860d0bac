"""Walks through folders of images: which files are images, and what else lies there."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.images import is_image
from data_prep.sources.base import Group, check_distinct, is_image_name, kind_of, readable
from data_prep.sources.objects import ObjectPath, open_file
from tarflow_dist.errors import UserError
from tarflow_dist.files import NotRegularError


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

    files = _in_store(folder, deep) if isinstance(folder, ObjectPath) else _on_disk(folder, deep)
    for name, is_there in files:
        if is_image_name(name) or (is_there and _holds_image(folder / name)):
            names.append(name)
            if not is_there:
                absent.add(name)
        else:
            passed_over[kind_of(name)] += 1
    return Images(folder, sorted(names), frozenset(absent), passed_over)


def _on_disk(folder: Path, deep: bool) -> Iterator[tuple[str, bool]]:
    """The files in a folder, and hidden folders: their names from there on, and whether they are
    there, or a link to nothing."""

    def search(path: str, inside: str, above: frozenset[tuple[int, int]]) -> Iterator[Any]:
        about = os.stat(path)
        here = (about.st_dev, about.st_ino)
        if here in above:
            return
        with os.scandir(path) as entries:
            for entry in entries:
                name = inside + entry.name
                if not entry.is_dir() or entry.name.startswith("."):
                    yield name, not entry.is_symlink() or os.path.exists(entry.path)
                elif deep:
                    yield from search(entry.path, f"{name}/", above | {here})

    return search(str(folder), "", frozenset())


def _in_store(folder: ObjectPath, deep: bool) -> Iterator[tuple[str, bool]]:
    """As _on_disk."""
    there = folder.listing()
    yield from ((name, True) for name in there.files)
    for name in there.folders:
        if name.startswith("."):
            yield name, True
        elif deep:
            yield from ((f"{name}/{file}", True) for file, _ in _in_store(folder / name, deep))


def _holds_image(file: Path) -> bool:
    if file.name.startswith("."):
        return False
    try:
        with open_file(file) as stream:
            return is_image(stream)
    except NotRegularError:
        return False


def folders_in(path: Path) -> list[str]:
    """The names of the folders in `path`, sorted, without hidden ones."""
    if isinstance(path, ObjectPath):
        names = path.listing().folders
    else:
        names = [file.name for file in path.iterdir() if file.is_dir()]
    return sorted(name for name in names if not name.startswith("."))


def unreadable(error: OSError) -> UserError:
    """What a user is told of a file or folder that the system refuses."""
    return UserError(f"can't read {error.filename}: {error.strerror}")
