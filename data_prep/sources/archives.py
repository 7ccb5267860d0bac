"""ImageNet's own archives, as the challenge's site hands them out."""

import gzip
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.base import Group, Images, Source
from data_prep.sources.names import check_distinct, is_image_name, kind_of
from data_prep.sources.storage import damage_named, open_file, read_file
from tarflow_dist.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SCANNERS = 16  # class tars scanned at a time: on a network's disks the waiting is what counts


class Archives(Source):
    """A folder with ILSVRC2012_img_train.tar (a tar of class tars), ILSVRC2012_img_val.tar (flat)
    and ILSVRC2012_devkit_t12.tar.gz (labels of the latter, names of the classes).

    Only headers are read here, and nothing is unpacked: images are read where they lie.

    Raises:
        UserError: an archive is missing, damaged, or not what its name says.
    """

    def __init__(self, path: Path):
        for archive in (TRAIN, VAL, DEVKIT):
            if not (path / archive).is_file():
                raise UserError(f"{path} has no {archive}: the archives are needed all three")
        names, truth = read_devkit(path / DEVKIT)
        classes = sorted(names)
        passed_over: Counter[str] = Counter()
        with damage_named(f"the archives in {path} are damaged"):
            groups = _train(path / TRAIN, classes, passed_over)
            groups += _val(path / VAL, classes, truth, passed_over)
        class_names = [names[wnid] for wnid in classes]
        super().__init__("archives", path, classes, groups, class_names, passed_over=passed_over)

    @staticmethod
    def recognises(path: Path) -> bool:
        return (path / TRAIN).is_file()


def read_devkit(file: Path) -> tuple[dict[str, str], list[str]]:
    """The names of the classes by wnid, and the wnid of each validation image in order."""
    with damage_named(f"{file} is damaged or no devkit"):
        content = BytesIO(gzip.decompress(read_file(file)))  # all of it, for its checksum
        with tarfile.open(fileobj=content) as tar:
            members = {re.sub(r"^.*/data/", "data/", member.name): member for member in tar}
            leaves = _leaves(read_member(tar, members["data/meta.mat"]))
            truth = read_member(tar, members["data/ILSVRC2012_validation_ground_truth.txt"])
        wnids = {number: wnid for number, wnid, _ in leaves}
        names = {wnid: words for _, wnid, words in leaves}
        return names, [wnids[int(number)] for number in truth.split()]


def _leaves(meta: bytes) -> list[tuple[int, str, str]]:
    """Of the devkit's meta.mat, the classes: number, wnid, and what people call it. The inner nodes
    of WordNet's tree stand there as well, and are no classes."""
    from scipy.io import loadmat

    synsets = np.atleast_1d(loadmat(BytesIO(meta), squeeze_me=True)["synsets"])
    return [
        (int(synset["ILSVRC2012_ID"]), str(synset["WNID"]), str(synset["words"]))
        for synset in synsets
        if synset["num_children"] == 0
    ]


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: Any = tar.extractfile(member)
    return file.read()


def _train(archive: Path, classes: list[str], passed_over: Counter[str]) -> list[Group]:
    with open_file(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        files = [member for member in tar if member.isfile()]
    members = [member for member in files if member.name.endswith(".tar")]
    passed_over.update(kind_of(m.name) for m in files if not m.name.endswith(".tar"))
    inside = {Path(member.name).stem: member for member in members}
    check_distinct([Path(member.name).stem for member in members], f"{archive} has two classes")
    if missing := sorted(set(classes) - set(inside)):
        raise UserError(
            f"{archive} lacks {len(missing)} of the devkit's {len(classes)} classes, first "
            f"{missing[0]}: fetch it again"
        )
    if unknown := sorted(set(inside) - set(classes)):
        raise UserError(f"{archive} has a class that the devkit lacks: {unknown[0]}")

    def group(label: int) -> Group:
        wnid = classes[label]
        member = inside[wnid]
        images = _scan(archive, member.offset_data, member.size)
        passed_over.update(images.passed_over)
        return images.group("train", label, f"train/{wnid}/")

    with ThreadPoolExecutor(SCANNERS) as pool:
        return list(pool.map(group, range(len(classes))))


def _val(
    archive: Path, classes: list[str], truth: list[str], passed_over: Counter[str]
) -> list[Group]:
    images = _scan(archive, 0, archive.stat().st_size)
    names = images.names
    passed_over.update(images.passed_over)
    if len(names) != len(truth):
        raise UserError(f"{archive} has {len(names)} images, and the devkit labels {len(truth)}")
    # the number in the name, …_val_00000293.JPEG, is the line of the ground truth, counted from 1
    numbers = [int(re.sub(r"\D", "", Path(name).stem.rpartition("_")[2]) or 0) for name in names]
    if sorted(numbers) != list(range(1, len(truth) + 1)):
        raise UserError(f"{archive} has images that are not numbered as the devkit's labels are")
    wnids = np.array([truth[number - 1] for number in numbers])

    return [
        images.group("val", label, f"val/{wnid}/").part("val", wnids == wnid)
        for label, wnid in enumerate(classes)
        if wnid in wnids
    ]


def _scan(archive: Path, start: int, size: int) -> Images:
    """The images in the tar that lies at `start` in `archive`."""
    found, passed_over = [], Counter[str]()
    with open_file(archive) as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in files_in(tar):
                if member.offset >= start + size:
                    break
                if is_image_name(member.name):
                    found.append((Path(member.name).name, member.offset_data, member.size))
                else:
                    passed_over[kind_of(member.name)] += 1
    found.sort()
    if not found or max(offset + length for _, offset, length in found) > start + size:
        raise tarfile.ReadError(f"{archive.name} is cut short")
    parts = np.array([part for _, *part in found], np.int64)
    return Images(archive, [name for name, *_ in found], passed_over, parts)


def files_in(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.isfile():
            yield member
