"""A finished sample store in the field's other formats. Each holds one chunk in memory at a time,
and the same samples make the same file."""

import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow_dist.evaluation.image_sets import NO_LABEL
from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.files import publish_folder, write_whole

IMAGES_A_TAR = 10_000


def write_npz(store: SampleStore) -> None:
    """samples.npz, ADM's sample file: arr_0 uint8 (num_samples, H, W, 3), grey repeated to three
    channels as ADM's evaluator wants it, and of a conditional model arr_1 int64 labels
    (num_samples,)."""
    labels = store.labels()
    height, width = store.read_images(0, rows=[0]).shape[1:3]
    shape = (store.num_samples, height, width, 3)
    chunks = (
        np.broadcast_to(images, (*images.shape[:3], 3))
        for images in map(store.read_images, range(store.num_chunks))
    )
    with (
        write_whole(store.folder / "samples.npz") as part,
        zipfile.ZipFile(part, "w") as archive,
    ):
        _write_array(archive, "arr_0", shape, np.dtype(np.uint8), chunks)
        if (labels != NO_LABEL).any():
            _write_array(archive, "arr_1", labels.shape, labels.dtype, [labels])


def _write_array(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    pieces: Iterable[NDArray],
) -> None:
    """Writes `pieces`, which make up an array of `shape` along the first axis, as `name`.npy."""
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    # ZipInfo has a fixed date
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(np.ascontiguousarray(piece).data)


def write_folder(store: SampleStore) -> None:
    """png/000000.png, …: as torch-fidelity and pytorch-fid read them."""
    part = _fresh(store.folder / ".png.part")
    for index, png, _ in _samples(store):
        (part / f"{index:06d}.png").write_bytes(png)
    publish_folder(part, store.folder / "png")


def write_tars(store: SampleStore) -> None:
    """wds/samples-000000.tar, …: WebDataset tars of 10,000 samples with keys png and, of a
    conditional model, cls."""
    from webdataset import ShardWriter

    part = _fresh(store.folder / ".wds.part")
    pattern = f"{str(part).replace('%', '%%')}/samples-%06d.tar"
    with ShardWriter(pattern, IMAGES_A_TAR, math.inf, verbose=0, mtime=0) as tars:
        for index, png, label in _samples(store):
            labelled = {} if label == NO_LABEL else {"cls": label}
            tars.write({"__key__": f"{index:06d}", "png": png, **labelled})
    publish_folder(part, store.folder / "wds")


WRITERS: dict[str, Callable[[SampleStore], None]] = {
    "npz": write_npz,
    "folder": write_folder,
    "tar": write_tars,
}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _samples(store: SampleStore) -> Iterator[tuple[int, bytes, int]]:
    """Index, PNG and label of each sample."""
    for chunk in range(store.num_chunks):
        yield from zip(store.chunk_indexes(chunk), *store.read_stored(chunk), strict=True)
