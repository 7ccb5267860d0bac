"""The formats of a set: how a shard of images is written, and the index of all shards.

All formats store the same images, cut into shards at the same ones.
"""

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tarflow_dist.files import read_json, write_whole

Shape = tuple[int, int, int]
Rows = Sequence[Mapping[str, Any]]
"""Of the manifest, an image each, with its bytes as `data`."""
IN_JSON = ("label", "class", "source")
MDS_COLUMNS = {"png": "png", "webp": "png", "jpeg": "jpeg", "keep": "jpeg"}
MDS_HASHES = ["sha1", "xxh64"]
IMAGE_HASHES = ("sha256", "xxh3_64")
"""Of each image, in the manifest."""


@dataclass(frozen=True)
class Shard:
    """A shard as the index has it."""

    file: str
    """In the set's folder."""
    images: int
    bytes: int
    hashes: dict[str, str]


class MDS:
    """MosaicML's format and its ImageNet columns: i (position), x (image), y (label).

    Images go as they are into a png or jpeg column, which opens whatever Pillow knows; raw ones
    into an array column of fixed shape, which has no header. A shard is the number of its samples,
    the offsets of each and of the end, its description in JSON, then the samples; a sample is the
    length of its image, where that is not fixed, then its columns. That is what streaming's
    `MDSWriter` writes, but that takes seconds and 450 MB to import, in each process.

    Args (of each format):
        name: of the set, for file names.
        encode: one of images.ENCODINGS.
        shape: (H, W, C) of the images, where they have one.
    """

    def __init__(self, name: str, encode: str, shape: Shape | None):
        column = MDS_COLUMNS.get(encode) or f"ndarray:uint8:{','.join(map(str, shape or ()))}"
        self._is_fixed = encode == "raw"
        self._about = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": MDS_HASHES,
            "size_limit": None,
            "column_names": ["i", "x", "y"],
            "column_encodings": ["int", column, "int"],
            "column_sizes": [8, int(np.prod(shape or ())) if self._is_fixed else None, 8],
        }

    def file(self, split: str, number: int) -> str:
        """What a split's shard is called."""
        return f"{split}/shard.{number:05d}.mds"

    def pack(self, rows: Rows) -> tuple[bytes, list[int]]:
        """The bytes of a shard, and where in them those of each image begin."""
        about = json.dumps(self._about, sort_keys=True).encode()
        lengths = np.array([len(row["data"]) for row in rows], np.int64)
        before = 8 if self._is_fixed else 4 + 8
        header = 4 * (1 + len(rows) + 1) + len(about)
        ends = header + np.cumsum([0, *(before + lengths + 8)])
        assert ends[-1] < 1 << 32, "shards are far smaller"
        parts = [np.uint32(len(rows)).tobytes(), ends.astype("<u4").tobytes(), about]
        for row in rows:
            if not self._is_fixed:
                parts.append(np.uint32(len(row["data"])).tobytes())
            parts += [_int64(row["position"]), row["data"], _int64(row["label"])]
        return b"".join(parts), (ends[:-1] + before).tolist()

    def hashes(self, data: bytes) -> dict[str, str]:
        """Those of a shard's bytes that the index has."""
        return {kind: digest(kind, data) for kind in MDS_HASHES}

    def write_index(self, folder: Path, splits: dict[str, list[Shard]]) -> None:
        """Writes into the set's `folder` what the format says of its shards."""
        for split, shards in splits.items():
            index = {"version": 2, "shards": self._entries(shards)}
            with write_whole(folder / split / "index.json") as part:
                part.write_text(json.dumps(index, sort_keys=True))

    def read_index(self, folder: Path, split: str) -> list[Shard]:
        """The shards of a split as `write_index` has described them.

        Raises:
            Exception: of any kind, it has not.
        """
        entries = read_json(folder / split / "index.json")["shards"]
        shards = []
        for entry in entries:
            about = entry["raw_data"]
            file = f"{split}/{about['basename']}"
            shards.append(Shard(file, entry["samples"], about["bytes"], about["hashes"]))
        _expect(entries, self._entries(shards))
        return shards

    def _entries(self, shards: Sequence[Shard]) -> list[dict[str, Any]]:
        return [
            {
                "samples": shard.images,
                "raw_data": {
                    "basename": Path(shard.file).name,
                    "bytes": shard.bytes,
                    "hashes": shard.hashes,
                },
                "zip_data": None,
                **self._about,
            }
            for shard in shards
        ]


def _int64(value: int) -> bytes:
    return np.int64(value).tobytes()


class Tar:
    """WebDataset tars under timm's names: keys png, jpg, … or npy (raw), cls and json, and their
    lengths in timm's `_info.json` beside the splits. Headers hold no times or owners. Arguments and
    methods as MDS."""

    def __init__(self, name: str, encode: str, shape: Shape | None):
        self._name = name
        self._npy_header = _npy_header(shape) if encode == "raw" and shape else b""

    def file(self, split: str, number: int) -> str:
        return f"{split}/{self._name}-{split}-{number:04d}.tar"

    def pack(self, rows: Rows) -> tuple[bytes, list[int]]:
        file, offsets = BytesIO(), []
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                about = {"index": row["position"], **{key: row[key] for key in IN_JSON}}
                key = f"{row['position']:08d}"
                suffix = "npy" if row["kind"] == "raw" else row["kind"]
                offsets.append(tar.offset + tarfile.BLOCKSIZE + len(self._npy_header))
                _add(tar, f"{key}.{suffix}", self._npy_header + row["data"])
                _add(tar, f"{key}.cls", str(row["label"]).encode())
                _add(tar, f"{key}.json", json.dumps(about).encode())
        return file.getvalue(), offsets

    def hashes(self, data: bytes) -> dict[str, str]:
        return {}

    def write_index(self, folder: Path, splits: dict[str, list[Shard]]) -> None:
        """timm's description of a set, so that timm reads it too; `shard_bytes` is ours."""
        info = {split: self._about(split, shards) for split, shards in splits.items()}
        with write_whole(folder / "_info.json") as part:
            part.write_text(json.dumps({"splits": info}, indent=1))

    def read_index(self, folder: Path, split: str) -> list[Shard]:
        about = read_json(folder / "_info.json")["splits"][split]
        entries = zip(about["filenames"], about["shard_lengths"], about["shard_bytes"], strict=True)
        shards = [Shard(file, images, size, {}) for file, images, size in entries]
        _expect(about, self._about(split, shards))
        return shards

    def _about(self, split: str, shards: Sequence[Shard]) -> dict[str, Any]:
        return {
            "name": split,
            "num_samples": sum(shard.images for shard in shards),
            "filenames": [shard.file for shard in shards],
            "shard_lengths": [shard.images for shard in shards],
            "shard_bytes": [shard.bytes for shard in shards],
        }


def _npy_header(shape: Shape) -> bytes:
    file = BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def _expect(found: object, written: object) -> None:
    if found != written:
        raise ValueError("it is not as data_prep writes it")


def digest(kind: str, data: bytes) -> str:
    """The hash of `data` in hexadecimal, by hashlib or xxhash."""
    hash_of = getattr(xxhash, kind, None) or getattr(hashlib, kind)
    return hash_of(data).hexdigest()


Format = MDS | Tar
FORMATS: dict[str, type[Format]] = {"mds": MDS, "wds": Tar}


def make_format(form: str, name: str, encode: str, size: int | None, channels: int) -> Format:
    """The format `form` of a set of `size` x `size` images, or of images of their own sizes."""
    return FORMATS[form](name, encode, (size, size, channels) if size else None)
