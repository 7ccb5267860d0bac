"""Training steps on a GPU, as far as a pretended one tells: the real engine at every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from ranks import free_port

SMALL = [
    *("train.micro_batch_size=8", "train.batch_size=16", "optimizer.warmup_images=16"),
    *("model.width=64", "model.num_blocks=2", "model.layers_per_block=1"),
    *("optimizer.clip_grad_norm=0.01", "log.wandb=disabled"),
]
WAITS = 2
"""Of a step for the card, on the whole: all in the optimiser, none in the passes."""
OFFLOADED = 3 * 36 + 5
"""With the optimiser on the host: three a parameter, and its own."""
CASES = {  # ZeRO stage, precision and settings: waits of a step
    (0, "fp32"): WAITS,
    (1, "fp32", "train.activation_checkpointing=1"): WAITS,
    (2, "fp32", "train.offload=true"): OFFLOADED,
    (3, "fp32", "train.activation_checkpointing=1"): WAITS,
    (1, "bf16"): WAITS,
    (3, "bf16", "train.offload=true"): OFFLOADED,
    (2, "bf16_autocast"): WAITS,
}


def train(
    tmp_path: Path, device: str, stage: int, precision: str, *others: str, ranks: int = 1
) -> dict:
    """On a machine a rank, each with one card, if it is pretended."""
    out = tmp_path / f"{device}.json"
    worker = Path(__file__).with_name("pretended_worker.py")
    config = [
        f"train.zero_stage={stage}",
        f"train.precision={precision}",
        f"run={tmp_path / device}",
        *others,
    ]
    alike = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    if ranks > 1:
        alike |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        alike |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, worker, ROOT / "configs/digits.yaml", out, device, *SMALL, *config],
            env=os.environ | alike | ({"RANK": str(rank)} if ranks > 1 else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """On the CPU; they are those of every stage."""
    return train(tmp_path_factory.mktemp("cpu"), "cpu", 1, "fp32")["losses"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_mixes_no_devices_and_seldom_waits(
    case: tuple, losses: list[float], tmp_path: Path
) -> None:
    """Nor does a checkpoint, which waits once for a tensor on the card and no more, a preview, or a
    step after the checkpoint was read."""
    on_card = train(tmp_path, "cuda", *case)
    same = on_card["losses"] == pytest.approx(losses, abs=1e-6)
    assert same == (case[1] == "fp32")
    assert on_card["losses"] == pytest.approx(losses, abs=1e-2)
    check_waits(on_card, CASES[case])
    copies = [times for line, times in on_card["to_save"].items() if "saver.py" in line]
    offloaded = "train.offload=true" in case  # but for the prior's variance
    assert copies == [1 if offloaded else on_card["tensors"]], on_card["to_save"]


def check_waits(on_card: dict, limit: int, settled: int = 1) -> None:
    """The first `settled` steps set up what later ones use."""
    for waits in on_card["waits"][settled:]:
        assert sum(waits.values()) <= limit, waits


@pytest.mark.parametrize("stage", [1, 3])
def test_nor_do_two_ranks(stage: int, losses: list[float], tmp_path: Path) -> None:
    on_cards = train(tmp_path, "cuda", stage, "fp32", ranks=2)
    assert on_cards["losses"] == pytest.approx(losses, abs=1e-6)
    check_waits(on_cards, 3 if stage == 3 else WAITS, settled=2)


def test_nor_does_an_itarflows(tmp_path: Path) -> None:
    model = ("model.sigma=null", "model.sigma_range=[0.1, 0.3]", "train.loss_weight=sigma")
    on_card, on_cpu = (train(tmp_path, device, 1, "fp32", *model) for device in ("cuda", "cpu"))
    assert on_card["losses"] == pytest.approx(on_cpu["losses"], abs=1e-6)
    check_waits(on_card, WAITS)
