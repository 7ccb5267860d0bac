"""Writers of one split's shards. Both store the same images, cut into shards at the same ones.

A shard is written beside and renamed, so that what carries its name is whole. What a writer returns
of a shard is all that the finished index needs to know of it: a run that goes on gives it back.
"""

import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tarflow_dist.files import sync, write_whole

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as it is stored."""

    index: int
    """Its position in the split."""
    label: int
    class_name: str
    source: str
    kind: str
    data: bytes


class ShardWriter(Protocol):
    """Writes the shards of a split, from the one after `done` on.

    Args:
        folder: the split's.
        name: for file names.
        encode: one of images.ENCODINGS.
        shape: (H, W, C) of the images.
        done: what was returned for the shards that are there already.
    """

    def __init__(
        self, folder: Path, *, name: str, encode: str, shape: Shape | None, done: Iterable[Any]
    ): ...

    def write(self, samples: Iterable[Sample]) -> dict[str, Any]:
        """The next shard. Returns its `file`, and of each image in it the place of its bytes in the
        file (`offsets`), among other things."""

    def finish(self) -> None:
        """Writes the index of all shards, and closes the writer."""


MDS_COLUMNS = {"png": "png", "webp": "png", "jpeg": "jpeg", "keep": "jpeg"}


class MDSShardWriter:
    """MosaicML's format and its ImageNet columns: i (position), x (image), y (label).

    Images go as they are into a png or jpeg column, which opens whatever Pillow knows; raw ones
    into an array column of fixed shape, which has no header.
    """

    def __init__(
        self, folder: Path, *, name: str, encode: str, shape: Shape | None, done: Iterable[Any]
    ):
        from streaming import MDSWriter

        self._folder, self._writing = folder, folder / ".writing"
        shutil.rmtree(self._writing, ignore_errors=True)
        column = MDS_COLUMNS.get(encode) or f"ndarray:uint8:{','.join(map(str, shape or ()))}"
        self._writer = MDSWriter(
            columns={"i": "int", "x": column, "y": "int"},
            out=str(self._writing),
            hashes=["sha1", "xxh64"],
            size_limit=None,
        )
        self._writer.shards += [entry["index"] for entry in done]

    def write(self, samples: Iterable[Sample]) -> dict[str, Any]:
        writer = self._writer
        lengths = []
        for sample in samples:
            writer.write({"i": sample.index, "x": sample.data, "y": sample.label})
            lengths.append((len(writer.new_samples[-1]), len(sample.data)))
        writer.flush_shard()
        writer._reset_cache()  # as `write` does when a shard is full
        whole, image = np.array(lengths).T
        # a shard is its number of samples and where they start, the columns, then the samples;
        # a sample ends with the image and the label, 8 bytes
        header = 4 * (1 + len(whole) + 1) + len(writer.config_data)
        offsets = header + np.cumsum(whole) - 8 - image
        entry = writer.shards[-1]
        file = entry["raw_data"]["basename"]
        _publish(self._writing / file, self._folder / file)
        return {"file": file, "offsets": offsets.tolist(), "index": entry}

    def finish(self) -> None:
        self._writer.finish()
        _publish(self._writing / "index.json", self._folder / "index.json")
        shutil.rmtree(self._writing)


class TarShardWriter:
    """WebDataset tars under timm's names: keys png, jpg, … or npy (raw), cls and json, and their
    lengths in timm's `_info.json` beside the splits. Headers hold no times or owners."""

    def __init__(
        self, folder: Path, *, name: str, encode: str, shape: Shape | None, done: Iterable[Any]
    ):
        folder.mkdir(exist_ok=True)
        self._folder, self._name = folder, name
        self._shards = [_summed_up(entry) for entry in done]
        self._npy_header = _npy_header(shape) if encode == "raw" and shape else b""

    def write(self, samples: Iterable[Sample]) -> dict[str, Any]:
        file = f"{self._name}-{self._folder.name}-{len(self._shards):04d}.tar"
        offsets = []
        with (
            write_whole(self._folder / file) as part,
            tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for sample in samples:
                about = {
                    "index": sample.index,
                    "label": sample.label,
                    "class": sample.class_name,
                    "source": sample.source,
                }
                key = f"{sample.index:08d}"
                suffix = "npy" if sample.kind == "raw" else sample.kind
                offsets.append(tar.offset + tarfile.BLOCKSIZE + len(self._npy_header))
                _add(tar, f"{key}.{suffix}", self._npy_header + sample.data)
                _add(tar, f"{key}.cls", str(sample.label).encode())
                _add(tar, f"{key}.json", json.dumps(about).encode())
        entry = {"file": file, "offsets": offsets, "size": (self._folder / file).stat().st_size}
        self._shards.append(_summed_up(entry))
        return entry

    def finish(self) -> None:
        """timm's description of a set, so that timm reads it too; `shard_bytes` is ours."""
        split = self._folder.name
        info_file = self._folder.parent / "_info.json"
        info = json.loads(info_file.read_text()) if info_file.exists() else {"splits": {}}
        files, lengths, sizes = zip(*self._shards, strict=True)
        info["splits"][split] = {
            "name": split,
            "num_samples": sum(lengths),
            "filenames": [f"{split}/{file}" for file in files],
            "shard_lengths": lengths,
            "shard_bytes": sizes,
        }
        with write_whole(info_file) as part:
            part.write_text(json.dumps(info, indent=1))


def _summed_up(entry: dict[str, Any]) -> tuple[str, int, int]:
    """A shard's file, its images and its bytes."""
    return entry["file"], len(entry["offsets"]), entry["size"]


def _npy_header(shape: Shape) -> bytes:
    file = BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def _publish(part: Path, file: Path) -> None:
    sync(part)
    os.replace(part, file)
    sync(file.parent)


WRITERS: dict[str, type[ShardWriter]] = {"mds": MDSShardWriter, "wds": TarShardWriter}
