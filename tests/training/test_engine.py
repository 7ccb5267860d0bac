"""DeepSpeed's engine against plain torch: losses, weights, average, and a resume in the middle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_worker import BATCH, EMA_DECAY, LR, STEPS, batch, new_flow

from tarflow_dist import config as configs
from tarflow_dist.training.checkpoint import Checkpoint

HERE = Path(__file__).parent
DIGITS = HERE.parents[1] / "configs" / "digits.yaml"
SMALL = [f"train.batch_size={BATCH}", "model.num_blocks=2", "model.layers_per_block=1"]
CELLS = [
    (1, "fp32", 1, 16),
    (2, "fp32", 1, 4),
    (2, "fp32", 2, 8),
    (1, "bf16", 1, 8),
    (2, "bf16", 1, 4),
    (2, "bf16", 2, 8),
]


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
        if step == STEPS // 2 - 1:
            weights = {name: p.detach().clone() for name, p in flow.named_parameters()}
            halfway = {"weights": weights, "ema": dict(ema)}
    return {"losses": losses, "grad_norm": float(norm), **halfway}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


@pytest.mark.parametrize(("ranks", "precision", "stage", "micro"), CELLS)
def test_training_equals_plain_torch_and_resumes_exactly(
    ranks: int, precision: str, stage: int, micro: int, plain: dict, tmp_path: Path
) -> None:
    out = tmp_path / "seen.json"
    overrides = [
        *SMALL,
        f"train.precision={precision}",
        f"train.zero_stage={stage}",
        f"train.micro_batch_size={micro}",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", HERE / "engine_worker.py", out, DIGITS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command), *overrides], check=True, env=environment)
    seen = json.loads(out.read_text())

    assert seen["resumed"] == seen["losses"][STEPS // 2 :]  # to the last bit
    exact = precision == "fp32"
    assert seen["losses"] == pytest.approx(plain["losses"], abs=1e-6 if exact else 2e-2)
    assert seen["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4 if exact else 0.1)
    saved = Checkpoint(Path(seen["folder"]))
    start = {n: p.detach() for n, p in new_flow(configs.load(DIGITS, SMALL)).named_parameters()}
    for kind in ("weights", "ema"):
        tensors = saved.read_all(kind)
        assert tensors.keys() == plain[kind].keys()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        moved = distance(plain[kind], start)
        assert distance(tensors, plain[kind]) < (1e-3 if exact else 0.5) * moved
