"""What only a card can show, by the user's commands: one rank over NCCL."""

import json
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, run

from tarflow_dist import config_file as configs
from tarflow_dist.data.loader import train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import open_shards
from tarflow_dist.telemetry.metrics_log import read_metrics
from tarflow_dist.training.maximum_likelihood import augment

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


def test_what_is_loaded_reaches_the_device(device: torch.device, digits: Path) -> None:
    """From memory that is pinned where there is a card, and it is what a CPU makes of it."""
    config = configs.load(ROOT / "configs/digits.yaml", ["data.flip=true"])
    shards = open_shards(digits / "mds", "train")
    batches = train_batches(
        shards,
        ImageOrder(shards.sizes, seed=0, window=16),
        position=0,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        num_workers=2,
    )
    for batch in islice(batches, 6):  # more than are loaded ahead: places in memory come again
        assert batch.images.is_pinned() == (device.type == "cuda")
        x, labels, _ = augment(batch, config, device)
        expected, classes, _ = augment(batch, config, torch.device("cpu"))
        assert x.device.type == labels.device.type == device.type
        torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-6)
        assert torch.equal(labels.cpu(), classes)


def test_the_demo(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu":
        pytest.skip("make demo: minutes on a CPU")
    command = [sys.executable, "-m", "tarflow_dist.demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train.precision=bf16" in done.stdout
    agreement = re.search(r"\nguided samples of the class asked for +([\d.]+)%", done.stdout)
    assert float(agreement[1]) > 80


def test_killed_it_goes_on(device: torch.device, plain: Path, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*CURVE, f"run={folder}", f"data.path={digits / 'mds'}", "train.zero_stage=0"]
    # in this session: who ends that, ends this too
    process = subprocess.Popen(command("tarflow_dist.train", *arguments), cwd=ROOT)
    while process.poll() is None and not (folder / "checkpoints" / "latest").exists():
        time.sleep(0.01)
    process.kill()
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
