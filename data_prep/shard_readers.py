"""What the files of a finished set hold, read as their formats define them."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, pairwise
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from data_prep.images import HONEST_PIXELS, open_image
from tarflow_dist.data.images import decode_image
from tarflow_dist.files import read_json

BLOCK = 512  # of a tar


@dataclass(frozen=True)
class Stored:
    """An image as its shard has it."""

    position: int
    label: int
    offset: int
    """Of its bytes in the shard."""
    bytes: int


@dataclass(frozen=True)
class Listed:
    """A shard as its format's own index describes it."""

    name: str
    """As in the manifest: split/file."""
    bytes: int
    samples: int
    hashes: dict[str, str]


def read_index(folder: Path, split: str) -> tuple[str, dict[str, Listed]]:
    """The name of the index that the format has of a split, and the shards in it by their names.

    Raises:
        Exception: of any kind, it is no such index.
    """
    if (folder / "_info.json").exists() or any((folder / split).glob("*.tar")):
        name = "_info.json"
        shards = _read_info(read_json(folder / name), split)
    else:
        name = f"{split}/index.json"
        shards = _read_mds_index(read_json(folder / name), split)
    return name, {shard.name: shard for shard in shards}


def _read_mds_index(index: dict[str, Any], split: str) -> Iterator[Listed]:
    for shard in index["shards"]:
        _expect(shard["column_names"] == ["i", "x", "y"], "columns")
        _expect(shard["compression"] is None, "compression")
        _expect(set(shard["raw_data"]["hashes"]) == {"sha1", "xxh64"}, "hashes")
        data = shard["raw_data"]
        name = f"{split}/{data['basename']}"
        yield Listed(name, data["bytes"], shard["samples"], dict(data["hashes"]))


def _read_info(info: dict[str, Any], split: str) -> Iterator[Listed]:
    part = info["splits"][split]
    _expect(part["num_samples"] == sum(part["shard_lengths"]), "num_samples")
    entries = zip(part["filenames"], part["shard_bytes"], part["shard_lengths"], strict=True)
    return (Listed(name, size, length, {}) for name, size, length in entries)


def mds_columns(
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


def mds_samples(data: bytes) -> list[Stored]:
    """The images of an MDS shard with the columns i (int), x (of any kind and length), y (int).

    Raises:
        Exception: of any kind, it is no such shard.
    """
    count, first = np.frombuffer(data, "<u4", 2).tolist()
    about = json.loads(data[4 * (count + 2) : first])
    sizes = about["column_sizes"]
    _expect(about["column_names"] == ["i", "x", "y"] and sizes[::2] == [8, 8], "columns")
    rows = mds_columns(data, sizes, count)
    _expect((rows[-1][-1][1] if rows else first) == len(data), "end")
    return [
        Stored(_integer(data[slice(*i)]), _integer(data[slice(*y)]), x[0], x[1] - x[0])
        for i, x, y in rows
    ]


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def tar_samples(data: bytes) -> list[Stored]:
    """The images of a WebDataset tar, each a file named by its index, then .cls and .json.

    Every byte is accounted for: headers are as they would be written, the rest is zeros.

    Raises:
        Exception: of any kind, it is no such tar.
    """
    samples, end = [], 0
    with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
        members = tar.getmembers()
        _expect(len(members) % 3 == 0, "number of files")
        for member in members:
            header = data[member.offset : member.offset_data]
            _expect(header == member.tobuf(tarfile.USTAR_FORMAT), f"header of {member.name}")
            end = member.offset_data + member.size
            padding = data[end : end + -member.size % BLOCK]
            _expect(not padding.strip(b"\0"), f"padding after {member.name}")
        for image, label, about in zip(*[iter(members)] * 3, strict=True):
            key = image.name.partition(".")[0]
            _expect([label.name, about.name] == [f"{key}.cls", f"{key}.json"], f"names at {key}")
            number = int(_content(data, label))
            described = json.loads(_content(data, about))
            _expect((described["index"], described["label"]) == (int(key), number), about.name)
            skip = _npy_header(_content(data, image)) if image.name.endswith(".npy") else 0
            samples.append(Stored(int(key), number, image.offset_data + skip, image.size - skip))
    _expect(not data[end:].strip(b"\0"), "padding at its end")
    return samples


def _content(data: bytes, member: tarfile.TarInfo) -> bytes:
    return data[member.offset_data : member.offset_data + member.size]


def _npy_header(data: bytes) -> int:
    """The length of the header of a .npy file."""
    file = BytesIO(data)
    _expect(np.load(file, allow_pickle=False).dtype == np.uint8, "type of the pixels")
    file.seek(0)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()


READERS: dict[str, Callable[[bytes], list[Stored]]] = {"mds": mds_samples, "tar": tar_samples}


def decode(data: bytes, summary: dict[str, Any]) -> Image.Image:
    """A stored image's bytes as a picture of the summary's size and channels.

    Raises:
        Exception: of any kind, it is no such image.
    """
    if summary["settings"]["encode"] == "keep":
        image = open_image(data, summary["settings"].get("max_pixels", HONEST_PIXELS))
        image.load()
        return image
    return decode_image(
        data,
        encode=summary["settings"]["encode"],
        side=summary["image_size"],
        channels=summary["channels"],
    )


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"unexpected {what}")


def digest(kind: str, data: bytes) -> str:
    """The hash of `data` in hexadecimal, by hashlib or xxhash."""
    hash_of = getattr(xxhash, kind, None) or getattr(hashlib, kind)
    return hash_of(data).hexdigest()
