"""ImageNet's own archives, as the challenge's site hands them out."""

import multiprocessing
import re
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.base import Group, Grouped, check_distinct, is_image_name, kind_of
from data_prep.sources.objects import open_file
from tarflow_dist.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SCANNERS = 16  # class tars scanned at a time: on a network's disks the waiting is what counts


class Archives(Grouped):
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
        try:
            groups = _train(path / TRAIN, classes, passed_over)
            groups += _val(path / VAL, classes, truth, passed_over)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"the archives in {path} are damaged: {error}") from error
        class_names = [names[wnid] for wnid in classes]
        super().__init__("archives", path, classes, groups, class_names, passed_over=passed_over)

    @staticmethod
    def recognises(path: Path) -> bool:
        return (path / TRAIN).is_file()


def read_devkit(file: Path) -> tuple[dict[str, str], list[str]]:
    """The names of the classes by wnid, and the wnid of each validation image in order."""
    # in a process of its own, since scipy's reader crashes on some damage
    spawn = multiprocessing.get_context("spawn")
    try:
        with open_file(file) as stream, tarfile.open(fileobj=stream) as tar:
            members = {re.sub(r"^.*/data/", "data/", member.name): member for member in tar}
            meta = _read(tar, members["data/meta.mat"])
            truth = _read(tar, members["data/ILSVRC2012_validation_ground_truth.txt"])
        with ProcessPoolExecutor(1, spawn) as pool:
            leaves = pool.submit(read_leaves, meta).result()
        wnids = {number: wnid for number, wnid, _ in leaves}
        names = {wnid: words for _, wnid, words in leaves}
        return names, [wnids[int(number)] for number in truth.split()]
    except BrokenProcessPool as error:
        raise UserError(f"{file} is damaged: its meta.mat crashes scipy; fetch it again") from error
    except PermissionError:
        raise
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} is damaged or no devkit ({error}): fetch it again") from error


def read_leaves(meta: bytes) -> list[tuple[int, str, str]]:
    """Of the devkit's meta.mat, the classes: number, wnid, and what people call it. The inner nodes
    of WordNet's tree stand there as well, and are no classes.

    Raises:
        ValueError: it is damaged.
    """
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(BytesIO(meta), squeeze_me=True)["synsets"])
        return [
            (int(synset["ILSVRC2012_ID"]), str(synset["WNID"]), str(synset["words"]))
            for synset in synsets
            if synset["num_children"] == 0
        ]
    except Exception as error:  # whatever damage does to a parser
        raise ValueError(f"meta.mat: {type(error).__name__} {error}") from None


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
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
        names, parts, others = _scan(archive, member.offset_data, member.size)
        passed_over.update(others)
        return Group("train", label, f"train/{wnid}/", archive, names, parts)

    with ThreadPoolExecutor(SCANNERS) as pool:
        return list(pool.map(group, range(len(classes))))


def _val(
    archive: Path, classes: list[str], truth: list[str], passed_over: Counter[str]
) -> list[Group]:
    names, parts, others = _scan(archive, 0, archive.stat().st_size)
    passed_over.update(others)
    if len(names) != len(truth):
        raise UserError(f"{archive} has {len(names)} images, and the devkit labels {len(truth)}")
    # the number in the name, …_val_00000293.JPEG, is the line of the ground truth, counted from 1
    numbers = [int(re.sub(r"\D", "", Path(name).stem.rpartition("_")[2]) or 0) for name in names]
    if sorted(numbers) != list(range(1, len(truth) + 1)):
        raise UserError(f"{archive} has images that are not numbered as the devkit's labels are")
    wnids = np.array([truth[number - 1] for number in numbers])

    def group(label: int, wnid: str) -> Group:
        places = np.flatnonzero(wnids == wnid)
        mine = [names[place] for place in places]
        return Group("val", label, f"val/{wnid}/", archive, mine, parts[places])

    return [group(label, wnid) for label, wnid in enumerate(classes) if wnid in wnids]


def _scan(archive: Path, start: int, size: int) -> tuple[list[str], np.ndarray, list[str]]:
    """Names of the images in the tar that lies at `start` in `archive`, sorted, and (n, 2) int64,
    their offsets in `archive` and sizes; the kinds of the other files in it."""
    with open_file(archive) as file:
        file.seek(start)
        tar: Any
        with tarfile.open(fileobj=file, mode="r:") as tar:
            found, others = [], []
            while (member := tar.next()) is not None and member.offset < start + size:
                tar.members.clear()  # tarfile would keep them all
                if member.isfile() and is_image_name(member.name):
                    found.append((Path(member.name).name, member.offset_data, member.size))
                elif member.isfile():
                    others.append(kind_of(member.name))
    found.sort()
    if not found or max(offset + length for _, offset, length in found) > start + size:
        raise tarfile.ReadError(f"{archive.name} is cut short")
    parts = np.array([part for _, *part in found], np.int64)
    return [name for name, _, _ in found], parts, others
