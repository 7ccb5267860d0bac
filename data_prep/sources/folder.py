"""Class folders."""

import os
from pathlib import Path

from data_prep.sources.base import (
    IMAGE_SUFFIXES,
    SPLITS,
    Group,
    Grouped,
    is_image,
    readable,
    shuffle_key,
)
from tarflow_dist.errors import UserError


class Folder(Grouped):
    """A folder of class folders, images at any depth below them: SRC/CLASS/…/IMAGE, split here, or
    SRC/{train,val}/CLASS/…/IMAGE, split as it lies. Folders without images are no classes.

    Args:
        val_fraction: share of each class held out where SRC is not split.

    Raises:
        UserError: `path` is no such folder.
    """

    def __init__(self, path: Path, *, val_fraction: float, seed: int):
        split_here = not all((path / split).is_dir() for split in SPLITS)
        if split_here:
            found = {"": images_by_class(path)}
            if set(found[""]) == {"train"}:
                raise UserError(f"{path} has train/ but no val/: give {path / 'train'} to split it")
        else:
            found = {f"{split}/": images_by_class(path / split) for split in SPLITS}
            if unknown := sorted(set(found["val/"]) - set(found["train/"])):
                raise UserError(f"{path / 'val'} has a class that train lacks: {unknown[0]}")
        classes = sorted(found["" if split_here else "train/"])
        groups = [
            Group(above.rstrip("/"), label, f"{above}{class_name}/", *found[above][class_name])
            for above in found
            for label, class_name in enumerate(classes)
            if class_name in found[above]
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
    about = (group.label, group.prefix, group.where)
    return Group("train", *about, train), Group("val", *about, val)


def images_by_class(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """For each folder in `folder` with images below it, by its readable name: the folder, and the
    images' paths in it, sorted. Hidden files and folders are left out.

    Raises:
        UserError: there are none, or a folder can't be read.
    """
    found = {}
    try:
        for class_folder in sorted(folder.iterdir()):
            if not class_folder.name.startswith(".") and class_folder.is_dir():
                names = _images_below(class_folder)
                if names:
                    found[readable(class_folder.name)] = (class_folder, names)
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror}") from error
    if not found:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{folder} has no class folders with images in them ({known})")
    return found


def _images_below(folder: Path) -> list[str]:
    names: list[str] = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(root, folder)
        names += [os.path.normpath(f"{inside}/{name}") for name in files if is_image(name)]
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error
