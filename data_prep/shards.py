"""Writers of one split's shards. Both store the same files, cut into shards at the same images."""

import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as it is stored."""

    index: int
    """Its position in the split."""
    label: int
    class_name: str
    name: str
    data: bytes
    """The image file."""


def write_mds(
    folder: Path, shards: Iterable[list[Sample]], *, name: str, encoding: str
) -> list[str]:
    """MosaicML's format and its ImageNet columns: i (position), x (image), y (label). Returns the
    shards' file names."""
    from streaming import MDSWriter

    writer = MDSWriter(
        columns={"i": "int", "x": encoding, "y": "int"},
        out=str(folder),
        hashes=["sha1", "xxh64"],
        size_limit=None,
    )
    with writer:
        for shard in shards:
            for sample in shard:
                # bytes go into an image column as they are
                writer.write({"i": sample.index, "x": sample.data, "y": sample.label})
            writer.flush_shard()
            writer._reset_cache()  # as `write` does when a shard is full
    return [shard["raw_data"]["basename"] for shard in writer.shards]


def write_wds(
    folder: Path, shards: Iterable[list[Sample]], *, name: str, encoding: str
) -> list[str]:
    """WebDataset tars under timm's names, with keys png or jpg, cls and json, and their lengths in
    timm's `_info.json` beside the splits; headers hold no times or owners. Returns the shards'
    file names."""
    suffix = {"png": "png", "jpeg": "jpg"}[encoding]
    folder.mkdir()
    files, lengths = [], []
    for number, shard in enumerate(shards):
        files.append(f"{name}-{folder.name}-{number:04d}.tar")
        with tarfile.open(folder / files[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in shard:
                about = {
                    "index": sample.index,
                    "label": sample.label,
                    "class": sample.class_name,
                    "source": sample.name,
                }
                key = f"{sample.index:08d}"
                _add(tar, f"{key}.{suffix}", sample.data)
                _add(tar, f"{key}.cls", str(sample.label).encode())
                _add(tar, f"{key}.json", json.dumps(about).encode())
        lengths.append(len(shard))
    _add_to_info(folder, files, lengths)
    return files


def _add_to_info(folder: Path, files: list[str], lengths: list[int]) -> None:
    """timm's description of a set, so that timm reads it too; `shard_bytes` is ours."""
    info_file = folder.parent / "_info.json"
    info = json.loads(info_file.read_text()) if info_file.exists() else {"splits": {}}
    info["splits"][folder.name] = {
        "name": folder.name,
        "num_samples": sum(lengths),
        "filenames": [f"{folder.name}/{file}" for file in files],
        "shard_lengths": lengths,
        "shard_bytes": [(folder / file).stat().st_size for file in files],
    }
    info_file.write_text(json.dumps(info, indent=1))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


WRITERS = {"mds": write_mds, "wds": write_wds}
