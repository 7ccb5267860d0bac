"""Sets of MosaicML's streaming: MDS shards."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.sources.base import MAX_CLASSES, Item, Place, set_name
from data_prep.sources.objects import ObjectPath, read_file, read_json
from data_prep.sources.splits import HoldOut, find_splits
from data_prep.sources.walk import folders_in
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside, open_regular

IMAGE_COLUMNS, LABEL_COLUMNS = ("x", "image", "img", "jpg"), ("y", "label", "cls")
FILES = ("jpeg", "png", "bytes")  # encodings that are an image file as it is
INTEGERS = re.compile(r"u?int(8|16|32|64)?")
PIXELS = re.compile(r"ndarray:uint8:(\d+,\d+(,3)?)")


@dataclass(frozen=True)
class Shard:
    """What is known of a shard before its images are read."""

    prefix: str
    """Of the items' names."""
    file: Path
    compression: str | None
    encoding: str
    """Of the image's column."""
    labels: np.ndarray
    """(n,) int64, of the images that have one."""
    parts: np.ndarray
    """(n, 2) int64: place of each image in the shard, once decompressed, and its length."""
    without_label: int
    in_val: np.ndarray
    """(n,) bool."""

    def items(self, path: Path) -> Iterator[Item]:
        """Of a source at `path`."""
        file = str(self.file.relative_to(path))
        reader = "part"
        if self.compression is not None or self.encoding not in FILES:
            reader = " ".join(filter(None, ["mds", self.encoding, self.compression]))
        for label, (offset, size), in_val in zip(
            self.labels.tolist(), self.parts.tolist(), self.in_val.tolist(), strict=True
        ):
            name = f"{self.prefix}{self.file.name}/{offset:010d}"
            place = Place(reader, file, 0, offset, size)
            yield Item("val" if in_val else "train", label, name, place)


class MDS:
    """A folder of folders named after the splits (train, val …), or the folder of one split, each
    with an index.json and its shards, compressed or not. Columns: an image (x or image: jpeg, png,
    pil, bytes or pixels in an ndarray) and its label (y or label: whole numbers). Where there is no
    val, it is drawn here. Labels stay as they are; classes are numbers, or those of the
    summary.json of this program's own sets.

    Only places and labels are read here, of compressed shards all. Nothing is unpickled: other
    columns are not looked at.

    Args:
        val_fraction: share of each class held out where there is no val.

    Raises:
        UserError: `path` is no such folder, or a shard is damaged.
    """

    layout = "mds"
    channels = 3

    def __init__(self, path: Path, *, val_fraction: float, seed: int):
        folders = _folders(path)
        splits, others = find_splits(folders)
        if "" in folders:
            splits, others = {"train": [""]}, [name for name in folders if name]
        if "train" not in splits:
            raise UserError(f"{path} has no train/index.json")
        self.path = path
        self._shards = [
            shard
            for split, names in splits.items()
            for name in names
            for shard in _scan_folder(path / name, f"{name}/" if name else "", split == "val")
        ]
        self.in_blocks = any(shard.compression is not None for shard in self._shards)
        labels = np.concatenate([shard.labels for shard in self._shards])
        if not len(labels):
            raise UserError(f"no image in {path} has a label from 0 on")
        self.notes = []
        if "val" not in splits:
            in_val = HoldOut(val_fraction, seed).draw([str(i) for i in range(len(labels))], labels)
            for shard in self._shards:
                shard.in_val[:], in_val = np.split(in_val, [len(shard.labels)])
            self.notes = ["no folder for val: a share of each class is held out"]
        self.passed_over = {f"folder {name}/": 1 for name in others}
        if without := sum(shard.without_label for shard in self._shards):
            self.passed_over["without a label"] = without
        self.classes, self.class_names = _classes(path, int(labels.max()) + 1)
        self.name = set_name(path, self.classes)

    @staticmethod
    def recognises(path: Path) -> bool:
        return path.is_dir() and bool(_folders(path))

    def __len__(self) -> int:
        return sum(len(shard.labels) for shard in self._shards)

    def items(self) -> Iterator[Item]:
        for shard in self._shards:
            yield from shard.items(self.path)

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for shard in self._shards:
            digest.update(str(shard.file.absolute()).encode(errors="surrogateescape"))
            for array in (shard.labels, shard.parts, shard.in_val):
                digest.update(array.tobytes())
        return digest.hexdigest()


def _folders(path: Path) -> list[str]:
    """Those of MDS shards: `path` itself, which is "", or folders in it."""
    names = ["", *folders_in(path)]
    return [
        name
        for name in names
        if (path / name / "index.json").is_file() and any((path / name).glob("*.mds*"))
    ]


def _scan_folder(folder: Path, prefix: str, in_val: bool) -> Iterator[Shard]:
    index = folder / "index.json"
    try:
        entries = read_json(index)["shards"]
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{index} is damaged or no index of MDS shards ({error})") from error
    for number, entry in enumerate(entries):
        try:
            yield _scan(folder, entry, prefix, in_val)
        except PermissionError:
            raise
        except Exception as error:  # whatever damage does to a parser, or to what decompresses
            said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise UserError(
                f"shard {number} of {index} can't be read ({said}): fetch it again"
            ) from error


def _scan(folder: Path, entry: dict[str, Any], prefix: str, in_val: bool) -> Shard:
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
    places = np.array([row[image] for row in columns], np.int64).reshape(-1, 2)[labelled]
    return Shard(
        prefix,
        file,
        compression,
        encoding,
        labels[labelled].astype(np.int64),
        np.stack([places[:, 0], places[:, 1] - places[:, 0]], axis=1),
        int((~labelled).sum()),
        np.full(int(labelled.sum()), in_val),
    )


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
    try:
        summary = read_json(file) if file.exists() else {}
        classes, names = _names(summary.get("classes")), _names(summary.get("class_names"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} can't be read ({error}): remove it") from error
    if classes is None or len(classes) < count:
        return [str(number) for number in range(count)], None
    return classes, names if names is not None and len(names) == len(classes) else None


def _names(value: Any) -> list[str] | None:
    sound = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value if sound else None
