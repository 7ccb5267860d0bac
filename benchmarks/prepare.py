"""Images/s of a preparation at 256 pixels, against the bare Pillow loop on the same files in as
many processes, its growth from one worker to two, and what it takes of the disk at most.

    python -m benchmarks.prepare [--photos 4000] [png webp jpeg]

The bare loop decodes, resizes, crops and encodes, and throws the result away; ours also plans,
hashes, checks and writes shards that survive a kill. Workers' starts and imports count, and so do
the sixteen images that are encoded to plan: with 400 photos they are a tenth, with 4000 a
hundredth.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks.pictures import write_photos
from benchmarks.side_by_side import alternate, ratio
from data_prep.images import CROPS
from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import open_source

SIZE, PHOTOS, ROUNDS = 256, 4000, 3
OPTIONS = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}
SECONDS_BETWEEN_LOOKS = 0.5  # a look costs a millisecond, which counts where all cores are busy


def ours(photos: Path, encode: str, workers: int, peaks: list[float]) -> float:
    """Adds to `peaks` what there was on the disk at most, as a share of the finished set."""
    with tempfile.TemporaryDirectory(dir=photos.parent) as out, watched(Path(out)) as sizes:
        began = time.perf_counter()
        source = open_source(photos, layout="folder", val_fraction=0.1, seed=0)
        prepare(source, Path(out), ["mds"], Settings(size=SIZE, encode=encode), workers=workers)
        rate = len(source) / (time.perf_counter() - began)
        peaks.append(max(sizes) / on_disk(Path(out)))
    return rate


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Yields the bytes that were in `folder`, a figure a look, while the body goes on."""
    sizes, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            sizes.append(on_disk(folder))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield sizes
    finally:
        ended.set()
        watcher.join()


def on_disk(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it has just been given another name
            total += file.stat().st_blocks * 512
    return total


def bare(files: list[Path], encode: str, workers: int) -> float:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_loop, args=(files[start::workers], encode))
        for start in range(workers)
    ]
    began = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return len(files) / (time.perf_counter() - began)


def _loop(files: list[Path], encode: str) -> None:
    for file in files:
        with Image.open(file) as image:
            pixels = CROPS["adm"](image.convert("RGB"), SIZE)
        pixels.save(BytesIO(), encode.upper(), **OPTIONS[encode])


def compare(photos: Path, files: list[Path], encode: str) -> None:
    """Prints the table's rows of an encoding."""
    peaks: dict[int, list[float]] = {1: [], 2: []}
    runs = {
        "ours 1": lambda: ours(photos, encode, 1, peaks[1]),
        "bare 1": lambda: bare(files, encode, 1),
        "ours 2": lambda: ours(photos, encode, 2, peaks[2]),
        "bare 2": lambda: bare(files, encode, 2),
    }
    rates = alternate(runs, rounds=ROUNDS)
    for workers in (1, 2):
        mine, peer = rates[f"ours {workers}"], rates[f"bare {workers}"]
        print(
            f"| {encode} | {workers} | {median(mine):,.0f} | {median(peer):,.0f} "
            f"| {ratio(mine, peer):.2f} | {ratio(mine, rates['ours 1']):.2f} "
            f"| {ratio(peer, rates['bare 1']):.2f} | {max(peaks[workers]):.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encodings", nargs="*", default=list(OPTIONS), metavar="png|webp|jpeg")
    parser.add_argument("--photos", type=int, default=PHOTOS, help="(default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, "photos")
        files = write_photos(photos, args.photos, different=200)
        print(
            "| encoding | workers | prepare | bare | prepare / bare | of 1 worker | bare, of 1 "
            "| most on disk / the set |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for encode in args.encodings:
            compare(photos, files, encode)


if __name__ == "__main__":
    main()
