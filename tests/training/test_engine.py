"""DeepSpeed's engine against plain torch: losses, weights, average, and a resume in the middle, at
every ZeRO stage and precision, on one, two and four ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_worker import BATCH, EMA_DECAY, HALF, LR, STEPS, VARIANCE, batch, new_flow

from tarflow_dist import config_file as configs
from tarflow_dist.training.checkpoint import Checkpoint

HERE = Path(__file__).parent
DIGITS = HERE.parents[1] / "configs" / "digits.yaml"
SMALL = [f"train.batch_size={BATCH}", "model.num_blocks=2", "model.layers_per_block=1"]
CELLS = {
    # ranks: name: precision, stage, micro-batch, others
    1: {
        "0": ("fp32", 0, 16),
        "1": ("fp32", 1, 8),
        "3": ("fp32", 3, 16),
        "1-bf16": ("bf16", 1, 8),
        "0-autocast": ("bf16_autocast", 0, 16),
    },
    2: {
        "0": ("fp32", 0, 4),
        "1": ("fp32", 1, 4, "train.activation_checkpointing=1"),
        "2": ("fp32", 2, 8),
        "2-offload": ("fp32", 2, 4, "train.offload=true"),
        "3": ("fp32", 3, 4, "train.activation_checkpointing=2"),
        "3-offload": ("fp32", 3, 4, "train.offload=true"),
        "1-bf16": ("bf16", 1, 4),
        "2-bf16": ("bf16", 2, 8),
        "1-bf16-sent": ("bf16", 1, 4, "train.reduce_precision=bf16"),
        "2-bf16-sent": ("bf16_autocast", 2, 4, "train.reduce_precision=bf16"),
        "3-bf16": ("bf16", 3, 4),
        "3-autocast": ("bf16_autocast", 3, 8),
    },
    4: {"1": ("fp32", 1, 4), "3": ("fp32", 3, 2), "2-bf16": ("bf16", 2, 4)},
}
ALL = [(ranks, name) for ranks, cells in CELLS.items() for name in cells]


@pytest.fixture(scope="module")
def plain() -> dict:
    """The same training in plain torch: AdamW, clipping, an average of the weights."""
    torch.set_num_threads(1)
    flow = new_flow(configs.load(DIGITS, SMALL))
    ema = {name: p.detach().clone() for name, p in flow.named_parameters()}
    optimizer = torch.optim.AdamW(flow.parameters(), LR, betas=(0.9, 0.95), weight_decay=1e-4)
    losses, halfway = [], {}
    for step in range(STEPS):
        loss = flow.loss(*flow(*batch(step)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        for name, parameter in flow.named_parameters():
            ema[name] = EMA_DECAY * ema[name] + (1 - EMA_DECAY) * parameter.detach()
        if step == HALF - 1:
            weights = {name: p.detach().clone() for name, p in flow.named_parameters()}
            halfway = {"weights": weights, "ema": dict(ema)}
    return {"losses": losses, "grad_norm": float(norm), **halfway}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict]:
    """What the cells of so many ranks saw. Those of two and four ranks also go on from a checkpoint
    of one rank at ZeRO stage 1."""
    done: dict[int, dict] = {}

    def launch(ranks: int) -> dict:
        if ranks in done:
            return done[ranks]
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        cells = {
            name: [
                *SMALL,
                f"train.precision={precision}",
                f"train.zero_stage={stage}",
                f"train.micro_batch_size={micro}",
                *others,
            ]
            for name, (precision, stage, micro, *others) in CELLS[ranks].items()
        }
        (folder / "cells.json").write_text(json.dumps(cells))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={ranks}", HERE / "engine_worker.py", DIGITS]
        command += [folder / "cells.json", folder / "seen.json"]
        if ranks > 1:
            command.append(launch(1)["1"]["checkpoint"])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*map(str, command)], check=True, env=environment)
        done[ranks] = json.loads((folder / "seen.json").read_text())
        return done[ranks]

    return launch


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_training_equals_plain_torch(
    ranks: int, name: str, seen: Callable[[int], dict], plain: dict
) -> None:
    cell = seen(ranks)[name]
    exact = CELLS[ranks][name][0] == "fp32"
    assert cell["losses"] == pytest.approx(plain["losses"], abs=1e-6 if exact else 5e-3)
    assert cell["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4 if exact else 0.1)
    saved = Checkpoint(Path(cell["checkpoint"]))
    start = {n: p.detach() for n, p in new_flow(configs.load(DIGITS, SMALL)).named_parameters()}
    for kind in ("weights", "ema"):
        tensors = saved.read_all(kind)
        assert tensors.keys() == plain[kind].keys()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        moved = distance(plain[kind], start)
        assert distance(tensors, plain[kind]) < (1e-3 if exact else 0.9) * moved


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_a_checkpoint_goes_on_exactly(ranks: int, name: str, seen: Callable[[int], dict]) -> None:
    """In a new engine, and in the one that has gone on since, to the last bit."""
    cell = seen(ranks)[name]
    assert cell["resumed"] == cell["losses"][HALF:]
    assert cell["rolled back"] == cell["losses"][HALF:]
    assert cell["variances"] == [[pytest.approx(VARIANCE)]] * 2


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_the_ranks_read_each_value_once(ranks: int, name: str, seen: Callable[[int], dict]) -> None:
    parameters = new_flow(configs.load(DIGITS, SMALL)).parameters()
    assert seen(ranks)[name]["read"] == 4 * sum(p.numel() for p in parameters)


@pytest.mark.parametrize(("ranks", "name"), [cell for cell in ALL if cell[0] > 1])
def test_a_checkpoint_goes_on_at_another_stage_and_world_size(
    ranks: int, name: str, seen: Callable[[int], dict], plain: dict
) -> None:
    exact = CELLS[ranks][name][0] == "fp32"
    found = seen(ranks)[name]["from elsewhere"]
    assert found == pytest.approx(plain["losses"][HALF:], abs=1e-6 if exact else 5e-3)
