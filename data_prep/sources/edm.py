"""Sets as StyleGAN and EDM have them: images and dataset.json, in a zip or a folder."""

import json
from collections import Counter
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

from data_prep.sources.base import Group, Images, Source
from data_prep.sources.names import (
    MAX_CLASSES,
    UNCONDITIONAL,
    find_splits,
    is_image_name,
    kind_of,
)
from data_prep.sources.storage import damage_named, open_file, read_file, zip_part
from data_prep.sources.walk import images_in
from tarflow_dist.errors import UserError

LABELS = "dataset.json"
MEND = "give one with null, or [name, number] an image"
LARGEST_LABELS = 1 << 28  # bytes: ImageNet's are 50 million


class EDM(Source):
    """A zip, or a folder, with images and a dataset.json, whose `labels` are null or [name, number]
    an image; or a folder with such zips for train and val, by their names. Labels stay as they are,
    and classes are the numbers; without labels it is an unconditional set. Images are read where
    they lie.

    Raises:
        UserError: `path` is no such set, or it is damaged.
    """

    held_out_note = "no val: a share of each class is held out"

    def __init__(self, path: Path):
        splits = _find(path)
        groups: list[Group] = []
        passed_over: Counter[str] = Counter()
        for split, place in splits.items():
            images, about = _read_folder(place) if place.is_dir() else _read_zip(place)
            passed_over += images.passed_over
            labels = _labels(images, about)
            prefix = "" if len(splits) == 1 else f"{place.stem}/"
            groups.append(images.group(split, labels, prefix).part(split, labels >= 0))
            passed_over["without a label"] += int((labels < 0).sum())
        if not all(group.names for group in groups):
            raise UserError(f"{path} has no images that its {LABELS} labels")
        count = 1 + max(int(np.max(group.label)) for group in groups)
        classes, notes = [str(number) for number in range(count)], []
        if count == 1:
            classes = [UNCONDITIONAL]
            notes.append("no labels, or one alone: an unconditional set, for model.num_classes=0")
        super().__init__("edm", path, classes, groups, passed_over=passed_over, notes=notes)

    @staticmethod
    def recognises(path: Path) -> bool:
        return path.suffix == ".zip" or (path / LABELS).is_file() or bool(_zips(path))


def _zips(path: Path) -> list[str]:
    """Those with a dataset.json; a damaged one may have one."""
    found = []
    for file in sorted(path.glob("*.zip")):
        try:
            with open_file(file) as stream, ZipFile(stream) as archive:
                if LABELS in archive.namelist():
                    found.append(file.name)
        except (OSError, BadZipFile):
            found.append(file.name)
    return found


def _find(path: Path) -> dict[str, Path]:
    """The zip or folder of each split."""
    if not path.is_dir() or (path / LABELS).is_file():
        return {"train": path}
    zips = _zips(path)
    if len(zips) == 1:
        return {"train": path / zips[0]}
    splits, others = find_splits(zips)
    if others or len(splits) != 2 or any(len(names) > 1 for names in splits.values()):
        raise UserError(f"{path} has {', '.join(zips)}: give one, or a folder with train and val")
    return {split: path / names[0] for split, names in splits.items()}


def _read_folder(folder: Path) -> tuple[Images, bytes]:
    """The images, and dataset.json."""
    images = images_in(folder)
    images.passed_over[kind_of(LABELS)] -= 1
    return images, read_file(folder / LABELS)


def _read_zip(file: Path) -> tuple[Images, bytes]:
    """As _read_folder."""
    found, passed_over = [], Counter[str]()
    with (
        damage_named(f"{file} can't be read"),
        open_file(file) as stream,
        ZipFile(stream) as archive,
    ):
        if archive.getinfo(LABELS).file_size > LARGEST_LABELS:
            raise ValueError(f"its {LABELS} is too large")
        about = archive.read(LABELS)
        for member in archive.infolist():
            if is_image_name(member.filename):
                found.append((member.filename, *zip_part(stream, member)))
            elif not member.is_dir() and member.filename != LABELS:
                passed_over[kind_of(member.filename)] += 1
    found.sort()
    parts = np.array([part for _, *part in found], np.int64).reshape(-1, 2)
    return Images(file, [name for name, *_ in found], passed_over, parts), about


def _labels(images: Images, about: bytes) -> np.ndarray:
    """(n,) int64: 0 without labels at all, -1 for an image that has none.

    Args:
        about: what dataset.json says.

    Raises:
        UserError: that is not as EDM's programs write it, or it knows other images.
    """
    with damage_named(f"{LABELS} in {images.where} has no labels as EDM's", MEND):
        listed = json.loads(about)["labels"]
        if listed is None:
            return np.zeros(len(images.names), np.int64)
        labels = {name.replace("\\", "/"): label for name, label in listed}
        for name, label in labels.items():
            if type(label) is not int or not 0 <= label < MAX_CLASSES:
                raise ValueError(f"the label of {name} is {str(label)[:100]}, and not a number")
    if missing := sorted(labels.keys() - set(images.names)):
        raise UserError(
            f"{images.where} lacks {len(missing)} of the images that {LABELS} labels, first "
            f"{missing[0]}: fetch it again"
        )
    return np.array([labels.get(name, -1) for name in images.names], np.int64)
