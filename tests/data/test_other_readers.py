"""The sets as other libraries read them, in every encoding, and what those leave behind."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from streaming import LocalDataset, StreamingDataset

from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import open_source
from tarflow_dist.data.shards import Shards, open_shards

ENCODINGS = ["png", "jpeg", "webp", "raw"]


@pytest.fixture(scope="module", params=ENCODINGS)
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty colour pictures of 16x16 as mds/ and wds/, in a few shards."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    for number in range(40):
        file = folder / "src" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    source = open_source(folder / "src", layout="folder", val_fraction=0.2, seed=0)
    settings = Settings(size=16, encode=request.param, shard_bytes=6000)
    prepare(source, folder / "out", ["mds", "wds"], settings)
    return folder / "out"


def pictures(shards: Shards) -> list[tuple[list, int]]:
    """Each image as nested lists (H, W, C), and its label."""
    found = (shards[index] for index in range(len(shards)))
    return [(image.transpose(1, 2, 0).tolist(), label) for image, label in found]


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_readers_see_the_same_images(out: Path, split: str, tmp_path: Path) -> None:
    expected = pictures(open_shards(out / "mds", split))
    assert pictures(open_shards(out / "wds", split)) == expected

    local = LocalDataset(str(out / "mds" / split))
    assert [(np.asarray(s["x"]).tolist(), s["y"]) for s in local] == expected
    stream = StreamingDataset(
        remote=str(out / "mds"),
        local=str(tmp_path / "stream"),
        split=split,
        batch_size=1,
        validate_hash="sha1",
    )
    read = (stream[index] for index in range(len(stream)))
    assert [(np.asarray(s["x"]).tolist(), s["y"]) for s in read] == expected

    tars = sorted(map(str, (out / "wds" / split).glob("*.tar")))
    assert len(tars) > 1
    samples = wds.WebDataset(tars, shardshuffle=False).decode("pil")
    read = (((s.keys() & {"png", "jpg", "webp", "npy"}).pop(), s) for s in samples)
    assert [(np.asarray(s[key]).tolist(), s["cls"]) for key, s in read] == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_timm_reads_the_tars(out: Path, split: str) -> None:
    timm = pytest.importorskip("timm.data")
    form = next(iter((out / "wds" / split).glob("*.tar")))
    if "npy" in os.popen(f"tar tf {form}").read():
        pytest.skip("timm opens image files, and raw pixels are none")
    dataset = timm.create_dataset(
        "wds/", root=str(out / "wds"), split=split, is_training=False, batch_size=1
    )
    read = [(np.asarray(image).tolist(), label) for image, label in dataset]
    assert read == pictures(open_shards(out / "wds", split))


READER = """
import sys
from tarflow_dist.data.loader import train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import open_shards

shards = open_shards(sys.argv[1], "train")
batches = train_batches(
    shards, ImageOrder(shards.sizes, seed=0, window=2), position=0, batch_size=8,
    micro_batch_size=8, rank=0, world_size=1, num_workers=2,
)
for _ in range(int(sys.argv[2])):
    next(batches)
print("read", flush=True)
sys.stdin.read()
"""


def test_shared_memory_left_by_a_killed_run_is_no_hindrance(digits: Path) -> None:
    """Names of streaming's as a killed run leaves them are no hindrance, and we leave none."""
    names = [f"000000_{kind}" for kind in ("locals", "barrier", "shard_states", "next_epoch")]
    left = []
    for name in names:
        with suppress(FileExistsError):  # a left-over indeed
            left.append(shared_memory.SharedMemory(name, create=True, size=64))
    try:
        before = {name for name in os.listdir("/dev/shm") if name[:6].isdigit()}
        for form, ending in (("wds", signal.SIGKILL), ("mds", signal.SIGKILL), ("mds", None)):
            with subprocess.Popen(
                [sys.executable, "-c", READER, str(digits / form), "20"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as reader:
                assert reader.stdout is not None
                assert reader.stdout.readline() == "read\n"
                if ending:
                    reader.send_signal(ending)
        after = {name for name in os.listdir("/dev/shm") if name[:6].isdigit()}
        assert after <= before
    finally:
        for memory in left:
            memory.close()
            memory.unlink()
