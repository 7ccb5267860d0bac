"""What a run does when numbers stop being finite, a loss jumps, or a rank hangs or dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, run

from tarflow_dist.telemetry.metrics_log import read_metrics
from tarflow_dist.training.checkpoint import Checkpoint
from tarflow_dist.training.latest_checkpoint import newest

BATCH, STEPS = 32, 12
SHORT = [
    "configs/digits.yaml",
    "model.num_blocks=3",
    "model.layers_per_block=1",
    f"train.images={STEPS * BATCH}",
    f"train.batch_size={BATCH}",
    "optimizer.lr=1e-4",
    "optimizer.warmup_images=0",
    f"checkpoint.every_images={5 * BATCH}",
    f"log.every_images={BATCH}",
    "log.wandb=disabled",
]
WORKER = str(Path(__file__).parent / "bad_hour_worker.py")


def launch(injection: str, *overrides: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", WORKER, injection, *SHORT, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("injection", "stage", "sentence"),
    [
        ("loss", 1, "the loss on rank 1 is not finite"),
        ("gradient", 0, "the gradient of block 1 on rank 1 is not finite"),
        ("gradient", 2, "the gradient of block 1 on rank 1 is not finite"),
        ("gradient", 3, "the gradient of block 1 on rank 1 is not finite"),
        ("spike", 1, "is more than 2.0 above the recent average"),
    ],
)
def test_a_bad_step_is_left_out_on_all_ranks(
    injection: str, stage: int, sentence: str, digits: Path, tmp_path: Path
) -> None:
    where = [f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}", f"train.zero_stage={stage}"]
    done = launch(injection, *where, "health.loss_spike=2.0")
    assert done.returncode == 0, done.stderr
    for step in (7, 8):
        assert f"left out the step to {step * BATCH} images: " in done.stderr
    assert done.stderr.count(sentence) == 2
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0] * 6 + [1, 2] + [2] * 4
    saved = Checkpoint(newest(tmp_path / "run" / "checkpoints"))
    assert saved.state.optimizer_steps == STEPS - 2
    assert all(row["loss"] is not None for row in rows[8:])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_broken_weights_come_back_from_the_checkpoint(
    stage: int, digits: Path, tmp_path: Path
) -> None:
    """Saved after 5 steps, broken in the 7th, given up after 3 steps that were left out: so the
    10th is taken by what was saved, on the images that are due."""
    where = [f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}", f"train.zero_stage={stage}"]
    done = launch("weights", *where, "health.max_skipped=3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the output of block 1 on rank 0 is not finite") == 3
    assert "3 steps in a row were left out: back to the weights of" in done.stderr
    assert f"{5 * BATCH:011d}, on from {9 * BATCH} images" in done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["loss"] is None for row in rows] == [False] * 6 + [True] * 3 + [False] * 3
    saved = Checkpoint(newest(tmp_path / "run" / "checkpoints"))
    assert saved.state.images == STEPS * BATCH
    assert saved.state.optimizer_steps == 5 + 3


def test_a_stuck_rank_ends_the_job_with_its_stack(digits: Path, tmp_path: Path) -> None:
    where = [f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}"]
    # the one of step 6 is begun when that of step 3 is there
    every = f"checkpoint.every_images={3 * BATCH}"
    done = launch("hang", *where, every, "health.step_timeout=4")
    assert done.returncode not in (0, 75)
    assert "Timeout (0:00:04)!" in done.stderr
    assert "time.sleep" in done.stderr or "bad_hour_worker.py" in done.stderr
    # what was saved before goes on
    assert newest(tmp_path / "run" / "checkpoints").name == f"{3 * BATCH:011d}"
    run("tarflow_dist.train", *SHORT, *where)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_a_dead_rank_ends_the_job(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*SHORT, f"run={folder}", f"data.path={digits / 'mds'}", "train.images=1000000"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "tarflow_dist.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as job:
        try:
            deadline = time.monotonic() + 300
            while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            children = f"/proc/{job.pid}/task/{job.pid}/children"
            ranks = [int(pid) for pid in Path(children).read_text().split()]
            os.kill(ranks[-1], signal.SIGKILL)
            assert job.wait(timeout=60) != 0
        finally:
            job.kill()


def test_previews_are_drawn_from_whole_averaged_weights(digits: Path, tmp_path: Path) -> None:
    """At ZeRO stage 3 on two ranks the picture is the one that the converted model draws."""
    from PIL import Image

    from tarflow_dist import TarFlow

    folder = tmp_path / "run"
    where = [f"run={folder}", f"data.path={digits / 'mds'}", "train.zero_stage=3"]
    every = STEPS * BATCH
    preview = [f"preview.every_images={every}", "preview.guidance=1", "preview.count=5"]
    run("tarflow_dist.train", *SHORT, *where, *preview, "train.precision=fp32", ranks=2)
    run("tarflow_dist.convert", folder, tmp_path / "model")
    drawn = np.asarray(Image.open(folder / "previews" / f"{every:011d}.png"))
    flow = TarFlow.from_pretrained(tmp_path / "model")
    samples = flow.sample([0, 2, 4, 6, 8], guidance=1, seed=0).numpy()
    # three in a row, each magnified to 64 pixels, 4 pixels of white between them
    for i, sample in enumerate(samples[..., 0]):
        top, left = i // 3 * 68, i % 3 * 68
        shown = drawn[top : top + 64 : 8, left : left + 64 : 8].astype(int)
        assert np.abs(shown - sample).max() <= 1
