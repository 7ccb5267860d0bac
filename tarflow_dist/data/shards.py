"""Reads the sets that data_prep writes, by image index, MDS and WebDataset tar alike: the manifest
says in which shard each image lies, where in it, and what its hash is."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from xxhash import xxh3_64_hexdigest

from tarflow_dist.data.store import Folder, Store, open_store
from tarflow_dist.errors import UserError

COLUMNS = ["split", "index", "label", "shard", "offset", "bytes", "xxh3_64"]


class Shards:
    """One split's images. Holds no open files, so it can be copied to other processes.

    Attributes:
        sizes: images in each shard.
        num_classes: labels are 0 … num_classes - 1.
        image_shape: (C, H, W).
        manifest: the set's manifest.parquet.
    """

    def __init__(self, path: str | Path, split: str, store: Store):
        self._path, self._split, self._store = path, split, store
        summary = _read_summary(path, store)
        side = summary["image_size"]
        if side is None:
            raise UserError(
                f"{path} keeps the images in their own sizes: prepare a set of one --size to read "
                "batches from"
            )
        self.num_classes = len(summary["classes"])
        self.image_shape = (summary["channels"], side, side)
        self._raw = summary["settings"]["encode"] == "raw"
        self.manifest = store.path("manifest.parquet")
        rows = _read_manifest(path, split, self.manifest)
        # one image's row here and there: plain arrays, which workers share until they write
        self._labels = rows["label"].to_numpy()
        self._offsets = rows["offset"].to_numpy()
        self._bytes = rows["bytes"].to_numpy()
        self._hashes = np.array(rows["xxh3_64"].to_numpy(zero_copy_only=False), "S16")
        shards = rows["shard"].combine_chunks().dictionary_encode()
        self._names: list[str] = shards.dictionary.to_pylist()
        self._shard = shards.indices.to_numpy()
        self.sizes: list[int] = np.bincount(self._shard).tolist()
        ends = np.cumsum(self.sizes) - 1
        # up to the end of its last image
        self._shard_bytes = (self._offsets[ends] + self._bytes[ends]).tolist()
        if (
            not np.array_equal(rows["index"].to_numpy(), np.arange(len(self)))
            or (np.diff(self._shard) < 0).any()
            or not 0 <= self._labels.min() <= self._labels.max() < self.num_classes
        ):
            raise ValueError("the manifest is not as written")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image, uint8 (C, H, W), and its label.

        Raises:
            UserError: it is not there, or is not the image that data_prep wrote.
        """
        return self._decode(self.stored(index)), int(self._labels[index])

    def stored(self, index: int) -> bytes:
        """The bytes of an image as they are stored.

        Raises:
            UserError: as above.
        """
        name = self._names[self._shard[index]]
        where = f"image {index} of {self._split}, in {self._path}/{name},"
        try:
            data = self._store.read(name, int(self._offsets[index]), int(self._bytes[index]))
        except OSError as error:
            raise UserError(f"{where} can't be read ({error.strerror}): {MEND}") from error
        if xxh3_64_hexdigest(data).encode() != self._hashes[index]:
            raise UserError(f"{where} is damaged: {MEND}")
        return data

    def check_cache(self, limit: int, window: int) -> None:
        """Raises `UserError` if the `window` largest shards are more than `limit` bytes."""
        needed = sum(sorted(self._shard_bytes)[-window:])
        if needed > limit:
            raise UserError(
                f"the cache may hold {limit} bytes, but {window} shards of {self._path} are read "
                f"from at a time, {needed} bytes: raise data.cache_limit or lower "
                "data.shuffle_window"
            )

    def check_files(self, folder: Path) -> None:
        """Raises `UserError` if a shard in `folder` is missing or ends too early."""
        for name, length in zip(self._names, self._shard_bytes, strict=True):
            file = folder / name
            there = file.stat().st_size if file.exists() else 0
            if there < length:
                raise UserError(
                    f"{file} is missing or cut short ({there} of {length} bytes): {MEND}"
                )

    def _decode(self, data: bytes) -> np.ndarray:
        channels, height, width = self.image_shape
        pixels = (
            np.frombuffer(data, np.uint8) if self._raw else np.asarray(Image.open(BytesIO(data)))
        )
        return pixels.reshape(height, width, channels).transpose(2, 0, 1)


MEND = "copy the shard again, and prove the whole with `python -m data_prep verify`"


def open_shards(
    path: str | Path,
    split: str,
    *,
    cache: Path | None = None,
    cache_limit: int | None = None,
    window: int = 1,
) -> Shards:
    """Opens the split of a set that data_prep wrote, OUT/mds or OUT/wds.

    Args:
        path: its folder, or its address in an object store (s3://…).
        split: train or val.
        cache: where shards of an object store are kept; None is a folder in the temporary one.
        cache_limit: bytes that may be kept there; None is 100 GB.
        window: shards that are read from at a time, which an object store's cache must hold.

    Raises:
        UserError: there is no such thing, it is damaged, or the cache is too small.
    """
    store = open_store(path, cache=cache, cache_limit=cache_limit)
    if isinstance(store, Folder):
        _check_folder(Path(path), split)
    try:
        shards = Shards(path, split, store)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, its summary or manifest is not as written: write it again"
        ) from error
    if isinstance(store, Folder):
        shards.check_files(Path(path))
    else:
        shards.check_cache(store.limit, window)
    return shards


def _check_folder(path: Path, split: str) -> None:
    if not path.is_dir():
        raise UserError(f"there are no shards at {path}: write them with `python -m data_prep`")
    if not (path / "summary.json").exists():
        inside = [path / form for form in ("mds", "wds") if (path / form).is_dir()]
        if inside:
            raise UserError(f"{path} holds sets: did you mean {' or '.join(map(str, inside))}?")
        if (path / split / "index.json").exists() or (path / "index.json").exists():
            raise UserError(
                f"{path} holds MDS shards that data_prep did not write, without summary and "
                "manifest: write them from the images with `python -m data_prep`"
            )
        raise UserError(f"{path} is no folder of shards: write one with `python -m data_prep`")
    if not (path / split).is_dir():
        found = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise UserError(f"{path} has no split {split}, only {found}")


def _read_summary(path: str | Path, store: Store) -> Any:
    try:
        return json.loads(store.path("summary.json").read_text())
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/summary.json is missing or damaged: write it again") from error


def _read_manifest(path: str | Path, split: str, file: Path) -> Any:
    """The split's rows, as a pyarrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(
            file,
            columns=COLUMNS,
            filters=[("split", "==", split)],
            page_checksum_verification=True,
        )
        rows.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path}/manifest.parquet is missing or damaged: write the set again"
        ) from error
    if not len(rows):
        raise UserError(f"{path} holds no images in {split}")
    return rows
