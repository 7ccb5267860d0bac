"""Builds the world that is damaged: sets, a run, a model, samples, sources, all of them small."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.fuzz.targets import SAMPLE_FID, TRAIN

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "data_prep"))

from layouts import WRITERS  # noqa: E402


def build(world: Path) -> None:
    shutil.copytree(ROOT / "configs", world / "configs")
    weights = load_file(ROOT / "tests/golden/cond.weights.safetensors")
    torch.save({n: w.float() for n, w in weights.items()}, world / "published.pth")
    for layout, write in WRITERS.items():
        write(world / layout)
    python(world, "data_prep", "digits", "digits")
    python(world, "tarflow_dist.train", *TRAIN)
    checkpoints = world / "run/checkpoints"  # as if killed after the last but one
    shutil.rmtree(checkpoints / "00000000256")
    (checkpoints / "latest").write_text("00000000192")
    python(world, "tarflow_dist.convert", "run", "model")
    calibrate = ("model", "--batch-sizes", "2", "--images", "2", "--guidance", "1")
    python(world, "tarflow_dist.calibrate", *calibrate)
    reference = ("digits/mds", "reference.npz", "--features", "pixels", "--split", "val")
    python(world, "tarflow_dist.reference", *reference)
    python(world, "tarflow_dist.sample_fid", *SAMPLE_FID, "reference.npz")
    leave_unfinished(world)


def python(world: Path, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=world,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")


def leave_unfinished(world: Path) -> None:
    """A preparation that was killed with one of its shards done."""
    job = subprocess.Popen(
        [sys.executable, "-m", "data_prep", "digits", "unfinished"],
        cwd=world,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    partial = world / "unfinished"
    while job.poll() is None and not any(partial.rglob("done/*.json")):
        time.sleep(0.001)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
