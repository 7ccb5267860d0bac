"""Training steps on a GPU, as far as a pretended one tells: the real engine at every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

SMALL = [
    *("train.micro_batch_size=8", "train.batch_size=16", "optimizer.warmup_images=16"),
    *("model.width=64", "model.num_blocks=2", "model.layers_per_block=1"),
    *("optimizer.clip_grad_norm=0.01", "log.wandb=disabled"),
]
WAITS = {0: 2, 1: 2, 2: 2, 3: 2}
"""Of a step for the card, at each ZeRO stage: all in the optimiser, none in the passes."""


def train(tmp_path: Path, device: str, stage: int, *others: str) -> dict:
    out = tmp_path / f"{device}.json"
    worker = Path(__file__).with_name("pretended_worker.py")
    config = [
        f"train.zero_stage={stage}",
        "train.precision=fp32",
        f"run={tmp_path / 'run'}",
        *others,
    ]
    done = subprocess.run(
        [sys.executable, worker, ROOT / "configs/digits.yaml", out, device, *SMALL, *config],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """On the CPU; they are those of every stage."""
    return train(tmp_path_factory.mktemp("cpu"), "cpu", 1)["losses"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_mixes_no_devices_and_seldom_waits(
    stage: int, losses: list[float], tmp_path: Path
) -> None:
    on_card = train(tmp_path, "cuda", stage)
    assert on_card["losses"] == pytest.approx(losses, abs=1e-6)
    waits = on_card["waits"][1]
    assert sum(waits.values()) <= WAITS[stage], waits


def test_nor_does_an_itarflows(tmp_path: Path) -> None:
    model = ("model.sigma=null", "model.sigma_range=[0.1, 0.3]", "train.loss_weight=sigma")
    on_card, on_cpu = (train(tmp_path, device, 1, *model) for device in ("cuda", "cpu"))
    assert on_card["losses"] == pytest.approx(on_cpu["losses"], abs=1e-6)
    waits = on_card["waits"][1]
    assert sum(waits.values()) <= WAITS[1], waits
