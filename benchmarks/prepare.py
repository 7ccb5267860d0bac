"""Images/s of a preparation at 256 pixels, against the bare Pillow loop on the same files in as
many processes, and its growth from one worker to two.

    python -m benchmarks.prepare [png webp jpeg]

The bare loop decodes, resizes, crops and encodes, and throws the result away; ours also plans,
hashes, checks and writes shards that survive a kill. Workers' starts and imports count.
"""

import multiprocessing
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks.pictures import write_photos
from benchmarks.side_by_side import alternate, ratio
from data_prep.images import CROPS
from data_prep.pipeline import prepare
from data_prep.records import Settings
from data_prep.sources import Folder

SIZE, PHOTOS, ROUNDS = 256, 800, 3
OPTIONS = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}


def ours(photos: Path, encode: str, workers: int) -> float:
    with tempfile.TemporaryDirectory(dir=photos.parent) as out:
        began = time.perf_counter()
        source = Folder(photos, val_fraction=0.1, seed=0)
        prepare(source, Path(out), ["mds"], Settings(size=SIZE, encode=encode), workers=workers)
        return len(source) / (time.perf_counter() - began)


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
    runs = {
        "ours 1": lambda: ours(photos, encode, 1),
        "bare 1": lambda: bare(files, encode, 1),
        "ours 2": lambda: ours(photos, encode, 2),
        "bare 2": lambda: bare(files, encode, 2),
    }
    rates = alternate(runs, rounds=ROUNDS)
    for workers in (1, 2):
        mine, peer = rates[f"ours {workers}"], rates[f"bare {workers}"]
        print(
            f"| {encode} | {workers} | {median(mine):,.0f} | {median(peer):,.0f} "
            f"| {ratio(mine, peer):.2f} | {ratio(mine, rates['ours 1']):.2f} "
            f"| {ratio(peer, rates['bare 1']):.2f} |",
            flush=True,
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, "photos")
        files = write_photos(photos, PHOTOS, different=200)
        print("| encoding | workers | prepare | bare | prepare / bare | of 1 worker | bare, of 1 |")
        print("|---|---|---|---|---|---|---|")
        for encode in sys.argv[1:] or OPTIONS:
            compare(photos, files, encode)


if __name__ == "__main__":
    main()
