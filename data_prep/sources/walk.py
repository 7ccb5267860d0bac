"""Walks through folders of images: which files are images, and what else lies there."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.images import is_image
from data_prep.sources.base import Images
from data_prep.sources.names import check_distinct, is_image_name, kind_of, readable
from data_prep.sources.storage import ObjectPath, open_file
from tarflow_dist.files import NotRegularError


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
        folders = (self.loose, *self.classes.values())
        found = sum((images.passed_over for images in folders), Counter[str]())
        found["loose images"] += len(self.loose.names) if self.classes else 0
        return found


def class_folders(folder: Path) -> ClassFolders:
    """What lies in `folder`. Hidden files and folders are passed over.

    Raises:
        UserError: two of the folders have one name.
        OSError: one can't be read.
    """
    found, empty = {}, []
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
    return ClassFolders(found, loose, empty)


def images_in(folder: Path, *, deep: bool = True) -> Images:
    """What lies in a folder, and, if `deep`, below it. Links to folders are followed, but not in
    circles.

    A file is an image by its suffix, or else by its content.

    Raises:
        OSError: something can't be read.
    """
    found = dict(_files(folder, deep))
    images = {
        name: is_there
        for name, is_there in found.items()
        if is_image_name(name) or (is_there and _holds_image(folder / name))
    }
    passed_over = Counter(kind_of(name) for name in found if name not in images)
    absent = frozenset(name for name, is_there in images.items() if not is_there)
    return Images(folder, sorted(images), passed_over, absent=absent)


def _files(
    folder: Path, deep: bool, above: frozenset[Path] = frozenset()
) -> Iterator[tuple[str, bool]]:
    """The files in a folder, and hidden folders: their names from there on, and whether they are
    there, or a link to nothing."""
    here = folder.resolve()
    if here in above:
        return
    for name, is_folder, is_there in _entries(folder):
        if not is_folder or name.startswith("."):
            yield name, is_there
        elif deep:
            for below, is_there in _files(folder / name, deep, above | {here}):
                yield f"{name}/{below}", is_there


def _entries(folder: Path) -> Iterator[tuple[str, bool, bool]]:
    """What lies in a folder: its name, whether it is a folder, whether it is there."""
    if isinstance(folder, ObjectPath):
        there = folder.listing()
        yield from ((name, True, True) for name in there.folders)
        yield from ((name, False, True) for name in there.files)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            is_there = not entry.is_symlink() or os.path.exists(entry.path)
            yield entry.name, entry.is_dir(), is_there


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
    return sorted(name for name, is_folder, _ in _entries(path) if is_folder and name[0] != ".")
