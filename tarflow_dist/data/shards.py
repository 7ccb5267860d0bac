"""Reads the shards that data_prep writes, by image index, MDS and WebDataset tar alike."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tarflow_dist.errors import UserError

MDS_ENCODINGS = {"int", "png", "jpeg"}  # what data_prep writes; MDS itself would also unpickle


class Shards:
    """One split's images. Holds no open files, so it can be copied to other processes.

    Attributes:
        sizes: images in each shard.
        num_classes: labels are 0 … num_classes - 1.
        image_shape: (C, H, W).
    """

    def __init__(self, sizes: list[int], *, num_classes: int, image_shape: tuple[int, int, int]):
        self.sizes, self.num_classes, self.image_shape = sizes, num_classes, image_shape
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image, uint8 (C, H, W), and its label."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        image, label = self._read(shard, index - int(self._ends[shard]) + self.sizes[shard])
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        assert pixels.shape == self.image_shape, f"image {index} is {pixels.shape}"
        return pixels, label

    def _read(self, shard: int, place: int) -> tuple[Image.Image, int]:
        raise NotImplementedError


class MDSShards(Shards):
    """MosaicML's format, read by its own library."""

    def __init__(self, folder: Path, sizes: list[int], **about: Any):
        from streaming import LocalDataset

        super().__init__(sizes, **about)
        self._shards = LocalDataset(str(folder)).shards

    def _read(self, shard: int, place: int) -> tuple[Image.Image, int]:
        sample = self._shards[shard][place]
        return sample["x"], sample["y"]


class TarShards(Shards):
    """WebDataset tars. A shard's headers are scanned when it is first read from."""

    def __init__(self, files: list[Path], sizes: list[int], **about: Any):
        super().__init__(sizes, **about)
        self._files = files
        self._members: dict[int, np.ndarray] = {}

    def _read(self, shard: int, place: int) -> tuple[Image.Image, int]:
        if shard not in self._members:
            self._members[shard] = _scan_tar(self._files[shard])
        offset, size, label = self._members[shard][place].tolist()
        with self._files[shard].open("rb", buffering=0) as file:
            file.seek(offset)
            return Image.open(BytesIO(file.read(size))), label


def _scan_tar(file: Path) -> np.ndarray:
    """(images, 3) int64: offset and size of each image file, and its label."""
    images, labels = [], []
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            suffix = member.name.rpartition(".")[2]
            if suffix == "cls":
                content = tar.extractfile(member)
                assert content is not None
                labels.append(int(content.read()))
            elif suffix in ("png", "jpg"):
                images.append((member.offset_data, member.size))
    return np.column_stack([np.array(images), np.array(labels)])


def open_shards(path: Path, split: str) -> Shards:
    """Opens `path`/`split`, `path` being a folder that data_prep wrote: OUT/mds or OUT/wds.

    Raises:
        UserError: there is no such thing, or it is damaged.
    """
    folder = path / split
    if not path.is_dir():
        raise UserError(f"there are no shards at {path}: write them with `python -m data_prep`")
    if not (path / "summary.json").exists():
        inside = [path / form for form in ("mds", "wds") if (path / form).is_dir()]
        if inside:
            raise UserError(f"{path} holds sets: did you mean {' or '.join(map(str, inside))}?")
        raise UserError(f"{path} is no folder of shards: write one with `python -m data_prep`")
    if not folder.is_dir():
        found = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise UserError(f"{path} has no split {split}, only {found}")
    try:
        summary = _read_json(path / "summary.json")
        about: dict[str, Any] = {
            "num_classes": len(summary["classes"]),
            "image_shape": (summary["channels"], summary["image_size"], summary["image_size"]),
        }
        if (folder / "index.json").exists():
            return _open_mds(folder, about)
        if any(folder.glob("*.tar")):
            return _open_wds(folder, about)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, its index is not as written: write it again"
        ) from error
    raise UserError(f"{folder} has neither MDS shards (index.json) nor tars: write it again")


def _open_mds(folder: Path, about: dict[str, Any]) -> Shards:
    shards = _read_json(folder / "index.json")["shards"]
    sizes = [shard["samples"] for shard in shards]
    files = [folder / shard["raw_data"]["basename"] for shard in shards]
    _check_files(folder, files, sizes, [shard["raw_data"]["bytes"] for shard in shards])
    if strange := {kind for shard in shards for kind in shard["column_encodings"]} - MDS_ENCODINGS:
        raise UserError(f"{folder} has columns of kind {strange.pop()}: not written by data_prep")
    return MDSShards(folder, sizes, **about)


def _open_wds(folder: Path, about: dict[str, Any]) -> Shards:
    info = _read_json(folder.parent / "_info.json")["splits"][folder.name]
    files = [folder.parent / name for name in info["filenames"]]
    _check_files(folder, files, info["shard_lengths"], info["shard_bytes"])
    return TarShards(files, info["shard_lengths"], **about)


def _check_files(folder: Path, files: list[Path], sizes: list[int], lengths: list[int]) -> None:
    if not sum(sizes):
        raise UserError(f"{folder} holds no images")
    for file, length in zip(files, lengths, strict=True):
        there = file.stat().st_size if file.exists() else 0
        if there != length:
            raise UserError(
                f"{file} is missing or cut short ({there} of {length} bytes): copy or write the "
                "shards again"
            )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged: write the shards again") from error
