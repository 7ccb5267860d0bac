"""What only a card can show, by the user's commands: one rank over NCCL."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, run

from tarflow_dist.telemetry.metrics import read_metrics

pytestmark = pytest.mark.cuda
BATCH = 32
CURVE = [
    "configs/digits.yaml",
    *(f"train.images={20 * BATCH}", f"train.batch_size={BATCH}", f"log.every_images={BATCH}"),
    *("optimizer.lr=1e-4", "optimizer.schedule=constant", "optimizer.warmup_images=0"),
    *(f"checkpoint.every_images={5 * BATCH}", "log.wandb=disabled"),
]
GUIDED = ("--guidance", 1, "--annealed")


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_folder)]


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run at ZeRO 0."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    data = f"data.path={digits / 'mds'}"
    run("tarflow_dist.train", *CURVE, f"run={folder}", data, "train.zero_stage=0")
    return folder


@pytest.mark.parametrize(
    "more",
    [
        ["train.zero_stage=1"],
        ["train.zero_stage=2"],
        ["train.zero_stage=3"],
        ["train.zero_stage=2", "train.offload=true"],
        ["train.zero_stage=1", "train.compile=true", "train.activation_checkpointing=1"],
        ["train.zero_stage=2", "train.micro_batch_size=8"],
    ],
    ids=" ".join,
)
def test_one_curve(
    more: list[str], device: torch.device, plain: Path, digits: Path, tmp_path: Path
) -> None:
    arguments = [*CURVE, f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}", *more]
    run("tarflow_dist.train", *arguments)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=2e-5)


def test_killed_it_goes_on(device: torch.device, plain: Path, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*CURVE, f"run={folder}", f"data.path={digits / 'mds'}", "train.zero_stage=0"]
    process = subprocess.Popen(
        command("tarflow_dist.train", *arguments), cwd=ROOT, start_new_session=True
    )
    while process.poll() is None and not (folder / "checkpoints" / "latest").exists():
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run("tarflow_dist.train", *arguments)
    assert losses(folder) == pytest.approx(losses(plain), abs=2e-5)


def test_samples_and_windows(
    device: torch.device, plain: Path, digits: Path, tmp_path: Path
) -> None:
    """The same samples twice, on the card; and calibrate, which judges windows there."""
    model = tmp_path / "model"
    run("tarflow_dist.convert", plain, model)
    results = []
    for name in ("first", "second"):
        fid = ["--model", model, "--reference", digits / "mds", "--features", "pixels", *GUIDED]
        fid += ["--num-samples", 40, "--batch-size", 20, "--out", tmp_path / name]
        run("tarflow_dist.sample_fid", *fid)
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert results[0]["samples_sha256"] == results[1]["samples_sha256"]
    assert results[0]["device"].startswith("cpu") == (device.type == "cpu")
    run("tarflow_dist.calibrate", model, "--batch-sizes", 4, "--images", 4, *GUIDED)
    run("tarflow_dist.sample", model, "--labels", "1,2", *GUIDED, "--out", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0
