"""WebDataset tars, timm's among them."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.sources.archives import SCANNERS, TRAIN, VAL, files_in, read_member
from data_prep.sources.base import Group, Source
from data_prep.sources.names import (
    MAX_CLASSES,
    find_splits,
    is_image_name,
    kind_of,
    names_by_label,
    wnids_by_label,
)
from data_prep.sources.storage import damage_named, open_file
from tarflow_dist.errors import UserError
from tarflow_dist.telemetry.progress import Progress

MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # a sample's key, and what the file is of it
CLASS_AND_FILE = re.compile(r"(?:.*/)?(n\d{8})/([^/]+)")
FIRST = 8  # files that tell what a tar is


class Sample(NamedTuple):
    """An image in a tar, and what its json says of it."""

    name: str
    """Of the file in the tar."""
    label: int
    part: tuple[int, int]
    """Offset and size."""
    path: str
    """The original file's, as timm has it: WNID/NAME; or empty."""
    class_name: str


class Scanned(NamedTuple):
    """The images of a tar. Compact: there may be a million."""

    names: list[str]
    paths: list[str]
    labels: np.ndarray
    parts: np.ndarray
    class_names: set[tuple[int, str]]
    wnids: set[tuple[int, str]]
    passed_over: Counter[str]


class WebDataset(Source):
    """Tars with an image and its label a sample: KEY.jpg, or any suffix of Pillow's, and KEY.cls,
    a number, or KEY.json, its `label`. They lie in `path` or in folders in it, and are told apart
    by the names of the splits in theirs: imagenet1k-train-0000.tar, imagenet1k-validation-00.tar,
    train/0.tar.

    Labels stay as they are. Classes are the wnids in the `filename` of the json, where each label
    has its own in sorted order, or else its `class` or `class_name`, or else the numbers.

    Only headers and labels are read here, and nothing is unpacked.

    Raises:
        UserError: `path` is no such folder, or a tar is damaged.
    """

    held_out_note = "no tars for val: a share of each class is held out"

    def __init__(self, path: Path):
        splits, others = find_splits(file.relative_to(path).as_posix() for file in _tars(path))
        if not splits:
            splits, others = {"train": others}, []
        if "train" not in splits:
            raise UserError(f"{path} has no tars for train, by their names: {others or splits}")
        passed_over = Counter({".tar": len(others)}) if others else Counter()
        places = [(split, path / name) for split, names in splits.items() for name in names]
        scanned = []
        progress = Progress("scan", len(places), unit="tar")
        with progress, ThreadPoolExecutor(SCANNERS) as pool:
            for found in pool.map(_scan, [tar for _, tar in places]):
                scanned.append(found)
                progress.update(1)
        classes, has_wnids = _classes(path, scanned)
        groups = []
        for (split, tar), found in zip(places, scanned, strict=True):
            passed_over += found.passed_over
            prefix = f"{split}/" if has_wnids else f"{tar.relative_to(path).as_posix()}/"
            names = found.paths if has_wnids else found.names
            groups.append(
                Group(split, found.labels, prefix, tar, names, found.parts, reader="part")
            )
        super().__init__("wds", path, classes, groups, passed_over=passed_over)

    @staticmethod
    def recognises(path: Path) -> bool:
        return any(_may_be_labelled(tar) for tar in _tars(path)[:1])


def _tars(path: Path) -> list[Path]:
    """Those that are none of the ILSVRC archives."""
    tars = sorted((*path.glob("*.tar"), *path.glob("*/*.tar")))
    return [file for file in tars if file.name not in (TRAIN, VAL)]


def _may_be_labelled(file: Path) -> bool:
    """Whether a label is among the first files; a damaged tar may have some."""
    try:
        with open_file(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            return any(member.name.endswith((".cls", ".json")) for member in islice(tar, FIRST))
    except (tarfile.TarError, OSError):
        return True


def _scan(file: Path) -> Scanned:
    samples: list[Sample] = []
    passed_over: Counter[str] = Counter()
    with (
        damage_named(f"{file} is damaged or no WebDataset tar"),
        open_file(file) as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        for _, members in groupby(_members(tar, passed_over), lambda member: member[0]):
            sample = _sample(tar, {role: member for _, role, member in members}, passed_over)
            if sample is not None:
                samples.append(sample)
    return Scanned(
        [sample.name for sample in samples],
        [sample.path for sample in samples],
        np.array([sample.label for sample in samples], np.int64),
        np.array([sample.part for sample in samples], np.int64).reshape(-1, 2),
        {(sample.label, sample.class_name) for sample in samples},
        {(sample.label, sample.path.partition("/")[0]) for sample in samples},
        passed_over,
    )


def _members(
    tar: tarfile.TarFile, passed_over: Counter[str]
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The sample, what it is of it (image, cls or json), and where it lies, of each file."""
    for member in files_in(tar):
        match = MEMBER.fullmatch(member.name)
        suffix = match[2].lower() if match else ""
        role = suffix if suffix in ("cls", "json") else "image"
        if match and (role != "image" or is_image_name(f"x.{suffix}")):
            yield match[1], role, member
        else:
            passed_over[kind_of(member.name)] += 1


def _sample(
    tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo], passed_over: Counter[str]
) -> Sample | None:
    if "image" not in files:
        return None
    image = files["image"]
    about = json.loads(read_member(tar, files["json"])) if "json" in files else {}
    about = about if isinstance(about, dict) else {}
    label = int(read_member(tar, files["cls"])) if "cls" in files else about.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < MAX_CLASSES:
        passed_over["without a label"] += 1
        return None
    original = CLASS_AND_FILE.fullmatch(str(about.get("filename")))
    class_name = about.get("class", about.get("class_name"))
    return Sample(
        image.name,
        label,
        (image.offset_data, image.size),
        f"{original[1]}/{original[2]}" if original else "",
        class_name if isinstance(class_name, str) else "",
    )


def _classes(path: Path, scanned: list[Scanned]) -> tuple[list[str], bool]:
    """The classes, and whether they are wnids, by which files are named."""
    wnids = {pair for found in scanned for pair in found.wnids}
    names = {pair for found in scanned for pair in found.class_names}
    if not wnids:
        raise UserError(f"the tars in {path} have no image with a label, in .cls or .json")
    count = max(wnids)[0] + 1
    if classes := wnids_by_label(wnids, count):
        return classes, True
    return names_by_label(names, count) or [str(number) for number in range(count)], False
