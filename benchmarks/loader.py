"""Images/s of the loader: against bare decoding of the same bytes in as many processes, and against
a torch DataLoader with as many workers over a class folder of the originals, resize included.

    python -m benchmarks.loader [png webp jpeg raw keep]

`keep` stores the originals, which our loader refuses (they are of many sizes): only its size is
given.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from benchmarks.pictures import write_photos
from benchmarks.side_by_side import alternate, ratio
from data_prep.images import ENCODINGS
from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import open_source
from tarflow_dist.data.loader import Batch, train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards, open_shards

SIZE, PHOTOS, BATCH, PROCESSES, ROUNDS = 256, 320, 32, 2, 5
FORMATS = ("mds", "wds")
IMAGES = {"png": 768, "webp": 768, "jpeg": 1536, "raw": 8192, "folder": 256}
"""That are read for one figure: about a second."""


def loader_rate(shards: Shards, images: int) -> float:
    return _rate(batches_of(shards, BATCH, PROCESSES), images)


def batches_of(shards: Shards, batch_size: int, workers: int) -> Iterator[Batch]:
    """As a single rank trains on them, from the first on."""
    return train_batches(
        shards,
        ImageOrder(shards.sizes, seed=0, window=16),
        position=0,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
        num_workers=workers,
    )


def folder_rate(folder: Path, images: int) -> float:
    """The usual way: decode, resize and crop the originals in the loader's workers."""
    transform = Compose([Resize(SIZE), CenterCrop(SIZE), PILToTensor()])
    dataset = ImageFolder(str(folder), transform)
    sampler = torch.randint(len(dataset), (2 * images,)).tolist()
    loader = DataLoader(dataset, BATCH, sampler=sampler, num_workers=PROCESSES)
    return _rate(iter(loader), images)


def _rate(batches: Iterator[Any], images: int) -> float:
    """From the batch on with which all workers are up and ahead."""
    for batch in islice(batches, 2 * PROCESSES):
        del batch
    began = time.perf_counter()
    count = sum(1 for _ in islice(batches, images // BATCH))
    assert count == images // BATCH
    return count * BATCH / (time.perf_counter() - began)


def bare_rate(stored: list[bytes], encode: str, images: int) -> float:
    """Decodes bytes in memory to arrays, which go nowhere."""
    share = [stored[i % len(stored)] for i in range(images // PROCESSES)]
    context = multiprocessing.get_context("fork")
    together = context.Barrier(PROCESSES + 1)

    def work() -> None:
        together.wait()
        for data in share:
            if encode == "raw":
                np.frombuffer(data, np.uint8).copy()
            else:
                np.asarray(Image.open(BytesIO(data)))
        together.wait()

    processes = [context.Process(target=work) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    together.wait()
    began = time.perf_counter()
    together.wait()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return len(share) * PROCESSES / seconds


def measure(photos: Path, encode: str) -> str:
    """A row of the table."""
    out = photos.parent / encode
    settings = Settings(size=None if encode == "keep" else SIZE, encode=encode, shard_bytes=4 << 20)
    source = open_source(photos, layout="folder", val_fraction=0.1, seed=0)
    prepare(source, out, FORMATS, settings, workers=PROCESSES)
    sizes = pq.read_table(out / "mds" / "manifest.parquet")["bytes"].to_numpy()
    size = f"{sizes.mean() / 1e3:.0f}"
    if encode == "keep":
        return f"| keep | {size} | | | | | | |"
    runs: dict[str, Callable[[], float]] = {}
    images = IMAGES[encode]
    for form in FORMATS:
        shards = open_shards(out / form, "train")
        runs[form] = lambda shards=shards: loader_rate(shards, images)
    stored = [shards.stored(index) for index in range(len(shards))]
    runs["bare"] = lambda: bare_rate(stored, encode, images)
    runs["folder"] = lambda: folder_rate(photos, IMAGES["folder"])
    rates = alternate(runs, rounds=ROUNDS)
    speeds = " | ".join(f"{median(rates[name]):,.0f}" for name in runs)
    bare, folder = (
        " / ".join(f"{ratio(rates[form], rates[peer]):.2f}" for form in FORMATS)
        for peer in ("bare", "folder")
    )
    return f"| {encode} | {size} | {speeds} | {bare} | {folder} |"


def main() -> None:
    torch.set_num_threads(1)
    print("| encoding | kB an image | MDS | tar | bare | folder | MDS, tar / bare | … / folder |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, "photos")
        write_photos(photos, PHOTOS)
        for encode in sys.argv[1:] or ENCODINGS:
            print(measure(photos, encode), flush=True)


if __name__ == "__main__":
    main()
