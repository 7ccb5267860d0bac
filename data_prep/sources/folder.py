"""Folders of image files: class folders, or pictures without classes."""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from data_prep.sources.base import Source
from data_prep.sources.names import (
    SPLIT_NAMES,
    SPLITS,
    UNCONDITIONAL,
    listed,
    readable,
    say_passed_over,
)
from data_prep.sources.walk import ClassFolders, class_folders, folders_in, images_in
from tarflow_dist.errors import UserError


class Folder(Source):
    """A folder of class folders, images at any depth below them: SRC/CLASS/…/IMAGE, split here, or
    SRC/{train,val}/CLASS/…/IMAGE, split as it lies; these may be called as in SPLIT_NAMES. Without
    class folders, SRC/IMAGE or SRC/{train,val}/IMAGE, it is an unconditional set of the one class
    UNCONDITIONAL. Folders without images are no classes. What is in no other layout is taken for
    this one.

    Raises:
        UserError: `path` is no such folder.
    """

    held_out_note = ""

    def __init__(self, path: Path):
        splits = _split_folders(path) or {"train": ""}
        found = {split: class_folders(path / name) for split, name in splits.items()}
        passed_over = _beside(path, splits.values()) if "val" in splits else Counter[str]()
        for there in found.values():
            passed_over += there.passed_over
        _check(found, passed_over)
        above = {split: f"{name}/" if name else "" for split, name in splits.items()}
        notes = [
            f"folders without images are no classes: {listed(there.empty)} in {there.loose.where}"
            for there in found.values()
            if there.empty
        ]
        first = next(iter(found.values()))
        if first.classes:
            classes = sorted(first.classes)
            groups = [
                there.classes[name].group(split, label, f"{above[split]}{name}/")
                for split, there in found.items()
                for label, name in enumerate(classes)
                if name in there.classes
            ]
        else:
            classes = [UNCONDITIONAL]
            notes.append("no class folders: an unconditional set, for model.num_classes=0")
            groups = [there.loose.group(split, 0, above[split]) for split, there in found.items()]
        super().__init__("folder", path, classes, groups, passed_over=passed_over, notes=notes)


def _check(found: dict[str, ClassFolders], passed_over: Counter[str]) -> None:
    """Raises `UserError` if what was `found`, by split, is no set."""
    for there in found.values():
        if not there.classes and not there.loose.names:
            besides = f": {say_passed_over(passed_over)}" if passed_over else ""
            raise UserError(f"{there.loose.where} has no images that Pillow reads{besides}")
    if "val" not in found:
        if len(there.classes) == 1 and (split := _split_of(name := next(iter(there.classes)))):
            other = SPLITS[split == "train"]
            alone = there.loose.where / name
            raise UserError(
                f"{there.loose.where} has {name}/ but no {other}/: give {alone} to split it"
            )
        return
    train, val = found["train"], found["val"]
    if bool(train.classes) != bool(val.classes):
        raise UserError(
            f"{train.loose.where} and {val.loose.where} differ: only one has class folders"
        )
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise UserError(f"{val.loose.where} has a class that train lacks: {unknown[0]}")


def _split_folders(path: Path) -> dict[str, str]:
    """The names of the train and the val folder in `path`; nothing if it isn't split.

    Raises:
        UserError: it can't be told which they are.
    """
    splits = {}
    plain = {name: _plain(name) for name in folders_in(path)}
    for split, known in SPLIT_NAMES.items():
        called = next((name for name in known if name in plain.values()), None)
        if called:
            splits[split] = [name for name in plain if plain[name] == called]
    if len(splits) < 2:
        return {}
    for split, names in splits.items():
        if len(names) > 1:
            raise UserError(f"{path} has {' and '.join(names)}: give a folder with one for {split}")
    return {split: names[0] for split, names in splits.items()}


def _split_of(name: str) -> str | None:
    return next((split for split in SPLITS if _plain(name) in SPLIT_NAMES[split]), None)


def _plain(name: str) -> str:
    """A split's name without year or size: train2017, train_64x64."""
    return re.sub(r"[-_]?\d+(x\d+)?$", "", name.lower())


def _beside(path: Path, splits: Collection[str]) -> Counter[str]:
    """What lies in `path` beside the folders of the splits, by its kind."""
    loose = images_in(path, deep=False)
    found = loose.passed_over.copy()
    found["loose images"] += len(loose.names)
    for name in folders_in(path):
        if name not in splits:
            there = images_in(path / name)
            found[f"in {readable(name)}/"] += len(there.names) + there.passed_over.total()
    return found
