"""200 damaged shards, one run each: every one is named in a sentence with exit code 2, or does no
harm (a bit may flip between the images).

    python -m benchmarks.damage [RUNS]

An epoch is read through the loader with two workers, as the trainer does; the first of each kind
of damage also meets `python -m tarflow_dist.train` itself.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from data_prep.pipeline import prepare
from data_prep.records import Settings
from data_prep.sources import Digits
from tarflow_dist.data.loader import train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import open_shards
from tarflow_dist.errors import run_command

KINDS = ("cut", "flipped", "emptied", "text", "missing")
FORMATS = ("mds", "wds")
TRAIN = ["train.images=1800", "train.batch_size=60", "optimizer.warmup_images=600"]
TRAIN += ["data.num_workers=2", "log.wandb=disabled"]
LIMIT_SECONDS = 600  # a run that takes longer hangs


def damage(file: Path, kind: str, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if kind == "cut":
        file.write_bytes(data[: draw.randrange(1, len(data) // 2)])
    elif kind == "flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("<html><body>404 Not Found</body></html>\n" * 100)
    else:
        file.unlink()


def read_an_epoch(argv: list[str]) -> None:
    """Of a set, next to a whole one."""
    shards, whole = (open_shards(folder, "train") for folder in argv)
    batches = train_batches(
        shards,
        ImageOrder(shards.sizes, seed=0, window=16),
        position=0,
        batch_size=60,
        micro_batch_size=60,
        rank=0,
        world_size=1,
        num_workers=2,
    )
    for _ in range(len(shards) // 60):
        batch = next(batches)
        for image, label, index in zip(
            batch.images.numpy(), batch.labels.tolist(), batch.index.tolist(), strict=True
        ):
            expected, its_label = whole[index]
            assert (image == expected).all()
            assert label == its_label


def outcome(whole: Path, number: int) -> tuple[str, str]:
    """The kind of damage, and what came of it."""
    kind, form = list(product(KINDS, FORMATS))[number % 10]
    draw = random.Random(number)
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(whole / form, Path(scratch, form))
        shards = sorted(f for f in (folder / "train").iterdir() if f.suffix in (".mds", ".tar"))
        shard = draw.choice(shards)
        damage(shard, kind, draw)
        found = [ending(["benchmarks.damage", "--read", folder, whole / form], shard)]
        if number < 10:
            config = ["configs/digits.yaml", f"run={scratch}/run", f"data.path={folder}"]
            found.append(ending(["tarflow_dist.train", *config, *TRAIN], shard))
    return kind, " and ".join(sorted(set(found)))


def ending(command: list[object], shard: Path) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode == 0:
        return "does no harm"
    if done.returncode == 2 and len(errors) == 1 and f"train/{shard.name}" in errors[0]:
        return "is named" if "Traceback" not in done.stderr else "is named after a traceback"
    return f"ends with {done.returncode}: {done.stderr[-300:]!r}"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        prepare(Digits(seed=0), whole, FORMATS, Settings(size=8, shard_bytes=1200))
        with ThreadPoolExecutor(2) as pool:
            found = Counter(pool.map(lambda number: outcome(whole, number), range(runs)))
    print("| a shard that is | | shards |\n|---|---|---|")
    for (kind, result), count in sorted(found.items()):
        print(f"| {kind} | {result} | {count} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        run_command(lambda argv: read_an_epoch(argv[1:]))
    main()
