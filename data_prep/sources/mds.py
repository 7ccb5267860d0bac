"""Sets of MosaicML's streaming: MDS shards."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.sources.base import Group, Place, Source
from data_prep.sources.names import MAX_CLASSES, find_splits
from data_prep.sources.storage import ObjectPath, damage_named, read_file
from data_prep.sources.walk import folders_in
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside, open_regular

IMAGE_COLUMNS, LABEL_COLUMNS = ("x", "image", "img", "jpg"), ("y", "label", "cls")
FILES = ("jpeg", "png", "bytes")  # encodings that are an image file as it is
INTEGERS = re.compile(r"u?int(8|16|32|64)?")
PIXELS = re.compile(r"ndarray:uint8:(\d+,\d+(,3)?)")


class MDS(Source):
    """A folder of folders named after the splits (train, val …), or the folder of one split, each
    with an index.json and its shards, compressed or not. Columns: an image (x or image: jpeg, png,
    pil, bytes or pixels in an ndarray) and its label (y or label: whole numbers). Labels stay
    as they are; classes are numbers, or those of the summary.json of this program's own sets.

    Only places and labels are read here, of compressed shards all. Nothing is unpickled: other
    columns are not looked at.

    Raises:
        UserError: `path` is no such folder, or a shard is damaged.
    """

    held_out_note = "no folder for val: a share of each class is held out"
    held_out_by_name = False

    def __init__(self, path: Path):
        folders = _folders(path)
        splits, others = find_splits(folders)
        if "" in folders:
            splits, others = {"train": [""]}, [name for name in folders if name]
        if "train" not in splits:
            raise UserError(f"{path} has no train/index.json")
        groups, without = [], 0
        for split, names in splits.items():
            for name in names:
                for group, unlabelled in _scan_folder(path, name, split):
                    groups.append(group)
                    without += unlabelled
        count = max((1 + int(np.max(g.label)) for g in groups if g.names), default=0)
        if not count:
            raise UserError(f"no image in {path} has a label from 0 on")
        classes, class_names = _classes(path, count)
        super().__init__(
            "mds",
            path,
            classes,
            groups,
            class_names,
            passed_over={f"folder {name}/": 1 for name in others} | {"without a label": without},
        )

    @staticmethod
    def recognises(path: Path) -> bool:
        return path.is_dir() and bool(_folders(path))


def _folders(path: Path) -> list[str]:
    """Those of MDS shards: `path` itself, which is "", or folders in it."""
    names = ["", *folders_in(path)]
    return [
        name
        for name in names
        if (path / name / "index.json").is_file() and any((path / name).glob("*.mds*"))
    ]


def _scan_folder(path: Path, name: str, split: str) -> Iterator[tuple[Group, int]]:
    """The labelled images of each shard in the folder `name`, and how many are without a label."""
    index = path / name / "index.json"
    with damage_named(f"{index} is damaged or no index of MDS shards"):
        entries = list(json.loads(read_file(index))["shards"])
    for number, entry in enumerate(entries):
        with damage_named(f"shard {number} of {index} can't be read"):
            yield _scan(index.parent, entry, f"{name}/" if name else "", split)


def _scan(folder: Path, entry: dict[str, Any], prefix: str, split: str) -> tuple[Group, int]:
    """Raises `ValueError` and others if it is no MDS shard with images and labels."""
    if entry["format"] != "mds":
        raise ValueError(f"its format is {entry['format']}, and not mds")
    file, compression = inside(folder, entry["raw_data"]["basename"]), None
    if not file.exists() and entry.get("zip_data"):
        file, compression = inside(folder, entry["zip_data"]["basename"]), entry["compression"]
    names, encodings = entry["column_names"], entry["column_encodings"]
    image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    if image is None or label is None:
        raise ValueError(f"its columns are {', '.join(names)}: none for the image or the label")
    encoding = encodings[image]
    if encoding not in (*FILES, "pil") and not PIXELS.fullmatch(encoding):
        raise ValueError(f"its images are in {encoding}")
    data = _read(file, compression)
    columns = _columns(data, entry["column_sizes"], entry["samples"])
    labels = np.array([_label(encodings[label], data[slice(*row[label])]) for row in columns])
    labelled = (labels >= 0) & (labels < MAX_CLASSES)
    begins, ends = np.array([row[image] for row in columns], np.int64).reshape(-1, 2)[labelled].T
    as_it_is = compression is None and encoding in FILES
    group = Group(
        split,
        labels[labelled].astype(np.int64),
        f"{prefix}{file.name}/",
        file,
        [f"{begin:010d}" for begin in begins],
        np.stack([begins, ends - begins], axis=1),
        reader="part" if as_it_is else " ".join(filter(None, ["mds", encoding, compression])),
        in_block=compression is not None,
    )
    return group, int((~labelled).sum())


@lru_cache(maxsize=1)
def _shard(file: Path, compression: str | None) -> bytes | mmap:
    return _read(file, compression)


def _read(file: Path, compression: str | None) -> bytes | mmap:
    """The bytes of a shard."""
    if compression is None and not isinstance(file, ObjectPath):
        with open(open_regular(file), "rb") as stream:
            return mmap(stream.fileno(), 0, access=ACCESS_READ)
    data = read_file(file)
    if compression is None:
        return data
    from streaming.base.compression import decompress

    return decompress(compression, data)


def _columns(
    data: bytes | mmap, sizes: list[int | None], count: int
) -> list[list[tuple[int, int]]]:
    """Of each of `count` samples of an MDS shard, where each column begins and ends.

    A shard is the number of samples, the offsets of each and of the end, its description in JSON,
    then the samples; a sample is the lengths of its columns of no fixed length, then its columns.

    Raises:
        ValueError: it isn't.
    """
    ends = np.frombuffer(data, "<u4", count + 1, offset=4).tolist()
    if int.from_bytes(data[:4], "little") != count or ends[-1] > len(data):
        raise ValueError(f"it holds not the {count} samples of its index")
    found: list[list[tuple[int, int]]] = []
    for begin, end in pairwise(ends):
        lengths, place = [], begin
        for size in sizes:
            if not size:
                size, place = int.from_bytes(data[place : place + 4], "little"), place + 4
            lengths.append(size)
        bounds = list(accumulate(lengths, initial=place))
        if bounds[-1] != end:
            raise ValueError(f"its sample {len(found)} has another length than its columns")
        found.append(list(pairwise(bounds)))
    return found


def _label(encoding: str, data: bytes) -> int:
    if encoding == "str_int":
        return int(data)
    if not INTEGERS.fullmatch(encoding):
        raise ValueError(f"its labels are in {encoding}, and not whole numbers")
    kind = np.dtype("int64" if encoding == "int" else encoding).newbyteorder("<")
    return int(np.frombuffer(data, kind, 1)[0])


def read_sample(
    file: Path, place: Place, encoding: str, compression: str | None = None
) -> bytes | np.ndarray:
    """An image file, or pixels. What is no image comes back as it is, to be set aside."""
    data = _shard(file, compression)[place.offset : place.offset + place.size]
    if encoding in FILES:
        return data
    if match := PIXELS.fullmatch(encoding):
        return np.frombuffer(data, np.uint8).reshape([int(side) for side in match[1].split(",")])
    width, height, length = np.frombuffer(data[:12], "<u4").tolist()
    mode, pixels = data[12 : 12 + length].decode(), data[12 + length :]
    try:
        image = Image.frombytes(mode, (width, height), pixels)
    except (ValueError, KeyError):
        return data
    return np.asarray(image if mode in ("L", "RGB") else image.convert("RGB"))


def _classes(path: Path, count: int) -> tuple[list[str], list[str] | None]:
    """Classes and their names, as the summary.json of one of our own sets says, or numbers."""
    file = path / "summary.json"
    with damage_named(f"{file} can't be read", "remove it"):
        summary = json.loads(read_file(file)) if file.exists() else {}
        classes, names = _names(summary.get("classes")), _names(summary.get("class_names"))
    if classes is None or len(classes) < count:
        return [str(number) for number in range(count)], None
    return classes, names if names is not None and len(names) == len(classes) else None


def _names(value: Any) -> list[str] | None:
    sound = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value if sound else None
