"""The sample store: a folder of drawn images that can be left and taken up again at any chunk."""

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_dist.distributed import rank, world_size
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.image_sets import (
    NO_LABEL,
    FolderImages,
    NpzImages,
    Pixels,
    Samples,
)
from tarflow_dist.files import read_sealed, regular, write_sealed, write_whole
from tarflow_dist.flow.config import MOST_CLASSES

SETTINGS_FILE = "settings.json"
VERSION = 1


class Facts(NamedTuple):
    """The metadata of a chunk."""

    sha256: str
    device: str
    redrawn: int


class SampleStore(Samples):
    """`num_samples` images, indexes 0, 1, 2, …, cut into chunks of `chunk_size`, one parquet each:
    columns index (int64), label (int64, −1 for none) and png (bytes); its metadata hold the SHA-256
    of labels and pixels, the device that drew them, and how many of them were lost at first and
    drawn again (`models/redraw.py`).

    settings.json beside them holds everything the samples depend on, so that chunks made in several
    sittings always belong together. All files become visible whole or not at all.

    Args:
        folder: need not exist yet.
        settings: JSON values, "num_samples" and "chunk_size" among them.

    Raises:
        UserError: the folder holds samples made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.num_samples: int = settings["num_samples"]
        self.chunk_size: int = settings["chunk_size"]
        self.num_chunks = -(-self.num_samples // self.chunk_size)
        there = _read_settings(folder) if any(folder.glob("samples-*.parquet")) else settings
        differing = [
            f"{key} {there.get(key)!r}, not {settings.get(key)!r}"
            for key in settings | there
            if there.get(key) != settings.get(key)
            and not (key == "num_samples" and there[key] < self.num_samples)  # it may grow
        ]
        if differing:
            raise UserError(
                f"{folder} holds samples made with {'; '.join(differing)}: choose another --out, "
                "or the settings that are there"
            )
        self._num_samples_there = there["num_samples"]

    def __len__(self) -> int:
        return self.num_samples

    def begin(self) -> None:
        """Writes the settings; one rank does this before any chunk is written. If there are fewer
        samples than are asked for now, a chunk that was the last and short is drawn again."""
        before = self._num_samples_there
        self.folder.mkdir(parents=True, exist_ok=True)
        if before < self.num_samples and before % self.chunk_size:
            self.chunk_file(before // self.chunk_size).unlink(missing_ok=True)
        write_sealed(self.folder / SETTINGS_FILE, self.settings, version=VERSION)

    def chunk_file(self, chunk: int) -> Path:
        return self.folder / f"samples-{chunk:06d}.parquet"

    def chunk_indexes(self, chunk: int) -> range:
        """The sample indexes of `chunk`; the last chunk may be short."""
        start = chunk * self.chunk_size
        return range(start, min(start + self.chunk_size, self.num_samples))

    def missing_chunks(self) -> list[int]:
        return [c for c in range(self.num_chunks) if not self.chunk_file(c).exists()]

    def write_chunk(
        self,
        chunk: int,
        images: Pixels,
        labels: NDArray[np.int64],
        *,
        redrawn: int = 0,
        device: str = "cpu",
    ) -> None:
        """Writes uint8 images (B, H, W, C) and labels (B,), drawn on `device`, `redrawn` of them
        more than once, as `chunk`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "index": pa.array(self.chunk_indexes(chunk), pa.int64()),
            "label": pa.array(labels, pa.int64()),
            "png": pa.array([encode_png(image) for image in images], pa.binary()),
        }
        sha256 = _digest(images, labels)
        metadata = {"sha256": sha256, "device": device, "redrawn": str(redrawn)}
        with write_whole(self.chunk_file(chunk)) as part:
            # PNG is compressed already
            pq.write_table(
                pa.table(columns, metadata=metadata),
                part,
                compression="none",
                use_dictionary=False,
                write_statistics=["index", "label"],  # not the smallest and the largest picture
                write_page_checksum=True,
            )

    def read_labels(self, chunk: int) -> NDArray[np.int64]:
        """The labels (B,) of `chunk`, without decoding an image."""
        labels = self._read(chunk, ["label"])["label"].to_numpy()
        if len(labels) and not NO_LABEL <= labels.min() <= labels.max() < MOST_CLASSES:
            raise self._damaged(chunk)
        return labels

    def labels(self) -> NDArray[np.int64]:
        """Those of all samples (num_samples,)."""
        return np.concatenate([self.read_labels(chunk) for chunk in range(self.num_chunks)])

    def read_stored(self, chunk: int) -> tuple[list[bytes], list[int]]:
        """The samples of `chunk` as PNG files, and their labels."""
        table = self._read(chunk, ["label", "png"])
        return table["png"].to_pylist(), table["label"].to_pylist()

    def read_images(self, chunk: int, rows: list[int] | None = None) -> Pixels:
        """The uint8 images (B, H, W, C) of `chunk`, or those of its `rows` only.

        Raises:
            UserError: they are not as they were written.
        """
        table = self._read(chunk, ["label", "png"])
        chosen = range(len(table)) if rows is None else rows
        try:
            images = np.stack([decode_png(table["png"][row].as_py()) for row in chosen])
        except Exception as error:  # Pillow's are of every kind
            raise self._damaged(chunk) from error
        if rows is None and _digest(images, table["label"].to_numpy()) != self._facts(chunk).sha256:
            raise self._damaged(chunk)
        return images

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share: indexes (B,) and images (B, C, H, W), a chunk at a time, which
        `batch_size` does not change."""
        for chunk in range(rank(), self.num_chunks, world_size()):
            images = torch.from_numpy(self.read_images(chunk)).permute(0, 3, 1, 2)
            yield torch.tensor(self.chunk_indexes(chunk)), images

    def images(self, indexes: Sequence[int]) -> Pixels:
        """The images (len(indexes), H, W, C) of the ascending sample indexes."""
        rows_of: dict[int, list[int]] = defaultdict(list)
        for index in indexes:
            rows_of[index // self.chunk_size].append(index % self.chunk_size)
        return np.concatenate([self.read_images(chunk, rows) for chunk, rows in rows_of.items()])

    def sha256(self) -> str:
        """One digest of all samples, the SHA-256 of the chunks' digests one after another. Equal
        wherever and in whatever sittings the same samples were drawn."""
        digests = [self._facts(chunk).sha256 for chunk in range(self.num_chunks)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def devices(self) -> list[str]:
        """The kinds of device that drew the samples."""
        return sorted({self._facts(chunk).device for chunk in range(self.num_chunks)})

    def redrawn(self) -> int:
        """How many samples were not finite or ran away at first, and were drawn again."""
        return sum(self._facts(chunk).redrawn for chunk in range(self.num_chunks))

    def _facts(self, chunk: int) -> Facts:
        metadata = self._read(chunk, []).schema.metadata or {}
        try:
            return Facts(
                metadata[b"sha256"].decode(),
                metadata[b"device"].decode(),
                int(metadata[b"redrawn"]),
            )
        except (KeyError, ValueError) as error:
            raise self._damaged(chunk) from error

    def _read(self, chunk: int, columns: list[str]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = regular(self.chunk_file(chunk))
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                table = parquet.read(columns=["index", *columns])
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(chunk) from error
        types = {"index": "int64", "label": "int64", "png": "binary"}
        whole = table.column_names == ["index", *columns] and all(
            str(table[name].type) == types[name] and not table[name].null_count
            for name in table.column_names
        )
        # another chunk's file under this one's name is as good as damaged
        if not whole or table["index"].to_pylist() != list(self.chunk_indexes(chunk)):
            raise self._damaged(chunk)
        return table

    def _damaged(self, chunk: int) -> UserError:
        return UserError(
            f"{self.chunk_file(chunk)} is damaged: delete it and run the same command again"
        )


def open_samples(path: Path) -> Samples:
    """The samples at `path`: a folder of `sample_fid`'s, an .npz of ADM's, or a folder of pictures.

    Raises:
        UserError: there is no such thing.
    """
    samples: Samples
    if path.is_file():
        samples = NpzImages(path)
    elif not (path / SETTINGS_FILE).exists():
        samples = FolderImages(path)
    else:
        samples = SampleStore(path, _read_settings(path))
        if missing := samples.missing_chunks():
            raise UserError(f"{path} lacks {len(missing)} of its chunks: draw them first")
    samples.about = {"samples": str(path), "num_samples": len(samples), "seconds": {}}
    return samples


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    if not file.exists():
        raise UserError(f"{folder} holds samples but no {SETTINGS_FILE}: empty it")
    try:
        there = read_sealed(file, version=VERSION)
        counts = there["num_samples"], there["chunk_size"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} can't be read ({error}): empty {folder}") from error
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise UserError(f"{file} makes no sense (num_samples, chunk_size): empty {folder}")
    return there


def _digest(images: Pixels, labels: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(labels, "<i8").data)
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def encode_png(image: Pixels) -> bytes:
    """uint8 (H, W, C) → PNG; one channel is grey, three are RGB."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(png: bytes) -> Pixels:
    """The inverse of `encode_png`."""
    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]))
    return image[:, :, None] if image.ndim == 2 else image
