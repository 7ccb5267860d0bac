"""Data preparation as a job on a real Slurm cluster of two nodes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import strikes
from commands import run as run_module
from strikes import ROOT, Launcher, until

COUNT = 3 * 2048  # images of train: three shards of as many as go in one


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """The downsampled ImageNet at 8x8, as far as its files go."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "src"
    folder.mkdir()
    for name, count in (("train_data_batch_1", COUNT), ("val_data", 300)):
        data = rng.integers(0, 256, (count, 192), dtype=np.uint8)
        np.savez(folder / name, data=data, labels=rng.integers(1, 8, count))
    return folder


def contents(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file() and file.name != "timing.json")
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


@pytest.mark.e2e
def test_two_nodes_prepare_a_set_and_one_of_them_is_lost(
    launch: Launcher, src: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out, alone = tmp_path / f"lost-{os.getpid()}", tmp_path / "alone"
    request.addfinalizer(lambda: shutil.rmtree(ROOT / "jobs" / f"data_prep-{out.name}"))
    options = ["--size=48", "--encode=webp", "--format=both", "--workers=1"]
    arguments = ["--cpus=1", "--time=30", "--signal-delay=120", "--task=data_prep", "--nodes=2"]
    (job,) = launch.submit(*arguments, "--", "imagenet", src, out, *options)
    done = out / ".partial" / "done"
    until(lambda: any(done.glob("[0-9]*.json")), "a shard")
    launch.wait(job, "RUNNING")
    strikes.kill_node(launch, job)
    until(lambda: launch.starts(job) == 2, "the restart")
    assert launch.end(job) == "COMPLETED"
    run_module("data_prep", "imagenet", src, alone, *options)
    assert contents(out) == contents(alone)
    assert json.loads((out / "mds" / "timing.json").read_text())["ranks"] == 2
