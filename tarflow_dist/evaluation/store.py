"""The sample store: a folder of drawn images that can be left and taken up again at any chunk."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_dist.errors import UserError
from tarflow_dist.files import write_whole

Pixels = NDArray[np.uint8]
NO_LABEL = -1
SETTINGS_FILE = "settings.json"


class SampleStore:
    """`num_samples` images, indexes 0, 1, 2, …, cut into chunks of `chunk_size`, one parquet each:
    columns index (int64), label (int64, −1 for none) and png (bytes).

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
        self._check_settings()

    def _check_settings(self) -> None:
        file = self.folder / SETTINGS_FILE
        if not any(self.folder.glob("samples-*.parquet")):
            return
        if not file.exists():
            raise UserError(f"{self.folder} holds samples but no {SETTINGS_FILE}: empty it")
        try:
            there = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} can't be read: empty {self.folder}") from error
        differing = [
            f"{key} {there.get(key)!r}, not {self.settings.get(key)!r}"
            for key in self.settings | there
            if there.get(key) != self.settings.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds samples made with {'; '.join(differing)}: choose another "
                "--out, or the settings that are there"
            )

    def begin(self) -> None:
        """Writes the settings; one rank does this before any chunk is written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with write_whole(self.folder / SETTINGS_FILE) as part:
                part.write_text(json.dumps(self.settings, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.folder} can't be written: {error}") from error

    def chunk_file(self, chunk: int) -> Path:
        return self.folder / f"samples-{chunk:06d}.parquet"

    def chunk_indexes(self, chunk: int) -> range:
        """The sample indexes of `chunk`; the last chunk may be short."""
        start = chunk * self.chunk_size
        return range(start, min(start + self.chunk_size, self.num_samples))

    def missing_chunks(self) -> list[int]:
        return [c for c in range(self.num_chunks) if not self.chunk_file(c).exists()]

    def write_chunk(self, chunk: int, images: Pixels, labels: NDArray[np.int64]) -> None:
        """Writes uint8 images (B, H, W, C) and labels (B,) as `chunk`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "index": pa.array(self.chunk_indexes(chunk), pa.int64()),
            "label": pa.array(labels, pa.int64()),
            "png": pa.array([encode_png(image) for image in images], pa.binary()),
        }
        with write_whole(self.chunk_file(chunk)) as part:
            # PNG is compressed already
            pq.write_table(pa.table(columns), part, compression="none")

    def read_labels(self, chunk: int) -> NDArray[np.int64]:
        """The labels (B,) of `chunk`, without decoding an image."""
        return self._read_columns(chunk, ["label"])[0].to_numpy()

    def read_images(self, chunk: int, rows: list[int] | None = None) -> Pixels:
        """The uint8 images (B, H, W, C) of `chunk`, or those of its `rows` only."""
        (png,) = self._read_columns(chunk, ["png"])
        chosen = range(len(png)) if rows is None else rows
        return np.stack([decode_png(png[row].as_py()) for row in chosen])

    def _read_columns(self, chunk: int, names: list[str]) -> list[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.chunk_file(chunk)
        try:
            with pq.ParquetFile(file) as parquet:
                table = parquet.read(columns=names)
            return [table.column(name) for name in names]
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(
                f"{file} is damaged: delete it and run the same command again"
            ) from error


def encode_png(image: Pixels) -> bytes:
    """uint8 (H, W, C) → PNG; one channel is grey, three are RGB."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(png: bytes) -> Pixels:
    """The inverse of `encode_png`."""
    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(png)))
    return image[:, :, None] if image.ndim == 2 else image
