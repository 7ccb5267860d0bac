"""Reads the sets that data_prep writes, by image index, MDS and WebDataset tar alike: the manifest
says in which shard each image lies, where in it, and what its hash is."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from xxhash import xxh3_64_hexdigest, xxh3_128

from tarflow_dist.data.images import decode_image
from tarflow_dist.data.store import Folder, open_store
from tarflow_dist.errors import REFUSED_BY_MACHINE, UserError
from tarflow_dist.files import inside, read_json, regular
from tarflow_dist.models.classes import Classes

COLUMNS = {
    "split": "string",
    "index": "int64",
    "label": "int64",
    "shard": "string",
    "offset": "int64",
    "bytes": "int64",
    "xxh3_64": "string",
}


class _Settings(BaseModel):
    encode: str


class Summary(BaseModel):
    """What readers need of a set's summary.json."""

    model_config = ConfigDict(strict=True)
    image_size: Annotated[int, Field(ge=1, le=1 << 16)] | None
    channels: Literal[1, 3]
    classes: list[str]
    class_names: list[str] | None = None
    settings: _Settings

    @classmethod
    def of(cls, content: Any) -> "Summary":
        """Raises `ValueError`, which names the field, if it is no summary's content."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            raise ValueError(f"the summary's {field or 'content'} is not as written") from error


class Shards:
    """One split's images. Holds no open files, so it can be copied to other processes.

    Attributes:
        sizes: images in each shard.
        num_classes: labels are 0 … num_classes - 1.
        classes: their names.
        image_shape: (C, H, W).
        manifest: the set's manifest.parquet.
    """

    def __init__(self, path: str | Path, split: str, store: Folder):
        self._path, self._split, self._store = path, split, store
        summary = Summary.of(read_json(store.path("summary.json")))
        side = summary.image_size
        if side is None:
            raise UserError(
                f"{path} keeps the images in their own sizes: prepare a set of one --size to read "
                "batches from"
            )
        self.num_classes = len(summary.classes)
        self.classes = Classes(summary.classes, summary.class_names or ())
        self.image_shape = (summary.channels, side, side)
        self._encode = summary.settings.encode
        self.manifest = store.path("manifest.parquet")
        rows = _read_manifest(path, split, self.manifest)
        # one image's row here and there: plain arrays, which workers share until they write
        self._labels = rows["label"].to_numpy()
        self._offsets = rows["offset"].to_numpy()
        self._bytes = rows["bytes"].to_numpy()
        self._hashes = np.array(rows["xxh3_64"].to_numpy(zero_copy_only=False), "S16")
        shards = rows["shard"].combine_chunks().dictionary_encode()
        self._names: list[str] = shards.dictionary.to_pylist()
        for name in self._names:
            inside(Path(), name)  # before any of them is read or downloaded
        self._shard = shards.indices.to_numpy()
        self.sizes: list[int] = np.bincount(self._shard).tolist()
        last = np.cumsum(self.sizes) - 1
        ends = self._offsets + self._bytes
        # up to the end of its last image
        self._shard_bytes = ends[last].tolist()
        if (
            not ((self._offsets >= 0) & (self._offsets <= ends)).all()
            or not (ends <= ends[last][self._shard]).all()
            or not np.array_equal(rows["index"].to_numpy(), np.arange(len(self)))
            or (np.diff(self._shard) < 0).any()
            or not 0 <= self._labels.min() <= self._labels.max() < self.num_classes
        ):
            raise ValueError("the manifest is not as written")

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def class_counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self._labels, minlength=self.num_classes).tolist()

    @property
    def fingerprint(self) -> str:
        """Another one for other images, labels, or another order; the format doesn't count."""
        digest = xxh3_128(self._hashes.tobytes())
        digest.update(self._labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def check_classes(self, num_classes: int) -> None:
        """Raises `UserError` if a model of `num_classes` has not just the classes that are here; 0
        are those of an unconditional model, which asks for none."""
        if num_classes not in (0, self.num_classes):
            raise UserError(
                f"{self._path} holds {self.num_classes} classes, and the model has {num_classes}: "
                "train one with model.num_classes as in the data, or give the data it was made for"
            )

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image, uint8 (C, H, W), and its label.

        Raises:
            UserError: it is not there, or is not the image that data_prep wrote.
        """
        data = self.stored(index)
        channels, side, _ = self.image_shape
        try:
            image = decode_image(data, encode=self._encode, side=side, channels=channels)
        except ValueError as error:
            raise UserError(f"{self._where(index)} is {error}: write the set again") from error
        pixels = np.asarray(image).reshape(side, side, channels).transpose(2, 0, 1)
        return pixels, int(self._labels[index])

    def stored(self, index: int) -> bytes:
        """The bytes of an image as they are stored.

        Raises:
            UserError: as above.
        """
        kept = None
        try:
            data = self._read(index)
            if not (whole := self._is_whole(index, data)):
                kept = self._store.renew(self._names[self._shard[index]])
                whole = self._is_whole(index, data := self._read(index))
        except OSError as error:
            raise UserError(
                f"{self._where(index)} can't be read ({error.strerror}): {MEND}"
            ) from error
        if whole:
            return data
        again = f", and so is what was fetched again to {kept}" if kept else ""
        raise UserError(f"{self._where(index)} is damaged{again}: {MEND}")

    def _where(self, index: int) -> str:
        name = self._names[self._shard[index]]
        return f"image {index} of {self._split}, in {self._path}/{name},"

    def _read(self, index: int) -> bytes:
        name = self._names[self._shard[index]]
        return self._store.read(name, int(self._offsets[index]), int(self._bytes[index]))

    def _is_whole(self, index: int, data: bytes) -> bool:
        return xxh3_64_hexdigest(data).encode() == self._hashes[index]

    @property
    def downloaded(self) -> bool:
        """Whether shards are fetched from an object store, each as a whole."""
        return self._store.limit is not None

    def check_cache(self, at_hand: int) -> None:
        """Raises `UserError` if the `at_hand` largest shards are more than the cache may hold."""
        needed = sum(sorted(self._shard_bytes)[-at_hand:])
        if self._store.limit is not None and needed > self._store.limit:
            raise UserError(
                f"the cache may hold {self._store.limit} bytes, but {at_hand} shards of "
                f"{self._path} are read from at a time, {needed} bytes: raise data.cache_limit, or "
                "lower data.shuffle_window and, in a new run, data.groups"
            )

    def check_files(self, folder: Path) -> None:
        """Raises `UserError` if a shard in `folder` is missing or ends too early."""
        for name, length in zip(self._names, self._shard_bytes, strict=True):
            file = inside(folder, name)
            there = file.stat().st_size if file.is_file() else 0
            if there < length:
                raise UserError(
                    f"{file} is missing or cut short ({there} of {length} bytes): {MEND}"
                )


MEND = "copy the shard again, and prove the whole with `python -m data_prep verify`"


def open_shards(
    path: str | Path,
    split: str,
    *,
    cache: Path | None = None,
    cache_limit: int | None = None,
) -> Shards:
    """Opens the split of a set that data_prep wrote, OUT/mds or OUT/wds.

    Args:
        path: its folder, or its address in an object store (s3://…).
        split: train or val.
        cache: where shards of an object store are kept; None is a folder in the temporary one.
        cache_limit: bytes that may be kept there; None is 100 GB.

    Raises:
        UserError: there is no such thing, it is damaged, or the cache can't hold a shard of it.
    """
    store = open_store(path, cache=cache, cache_limit=cache_limit)
    if store.limit is None:
        _check_folder(Path(path), split)
    try:
        shards = Shards(path, split, store)
    except UserError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno in REFUSED_BY_MACHINE:
            raise UserError(f"can't read {error.filename or path}: {error.strerror}") from error
        raise UserError(
            f"{path} is damaged, its summary or manifest is not as written, or missing: write it "
            "again"
        ) from error
    if store.limit is None:
        shards.check_files(Path(path))
    shards.check_cache(1)
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


def _read_manifest(path: str | Path, split: str, file: Path) -> Any:
    """The split's rows, as a pyarrow table.

    Raises:
        OSError, ValueError: the manifest is missing or damaged.
        UserError: the split holds no images.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(
            regular(file),
            columns=list(COLUMNS),
            filters=[("split", "==", split)],
            page_checksum_verification=True,
        )
        rows.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    if not len(rows):
        raise UserError(f"{path} holds no images in {split}")
    check_types(rows, COLUMNS)
    return rows


def check_types(rows: Any, columns: dict[str, str]) -> None:
    """Raises `ValueError` if a pyarrow table's columns are not of these types, or have gaps."""
    for name, kind in columns.items():
        if str(rows[name].type) != kind or rows[name].null_count:
            raise ValueError(f"the column {name} is not all {kind}")
