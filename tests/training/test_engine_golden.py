"""The published model's losses over six AdamW steps, through DeepSpeed's engine in fp32."""

import json
import os
import subprocess
import sys

import pytest
from golden_model import CASES, golden_flow, golden_vectors

STAGES = (0, 1, 2, 3)
ITARFLOW = "itarflow"
ALL = (*CASES, ITARFLOW)


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    """Of each case and stage, made in a process of its own: this file as a program."""
    done = subprocess.run(
        [sys.executable, __file__],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_published_models(
    case: str, stage: int, losses: dict[str, list[float]]
) -> None:
    golden = golden_vectors(case)["train.losses"].tolist()
    assert losses[f"{case} {stage}"] == pytest.approx(golden, abs=1e-5)


def train(case: str, stage: int) -> list[float]:
    import torch

    from tarflow_dist.config import Config
    from tarflow_dist.training.engine import Engine

    flow, vectors = golden_flow(case, torch.float32), golden_vectors(case)
    x, y, sigma = vectors["x"].float(), vectors.get("y"), None
    if case == ITARFLOW:
        y, sigma = vectors["y_drop"], vectors["sigma"].float()
    config = Config.model_validate(
        {
            "run": "unused",
            "model": flow.config,
            "data": {"path": "unused"},
            "optimizer": {"clip_grad_norm": None},
            "train": {
                "images": 100,
                "batch_size": len(x),
                "precision": "fp32",
                "zero_stage": stage,
            },
            "checkpoint": {"every_images": 1},
            "log": {"every_images": 1},
        }
    )
    engine = Engine(flow, config, len(x))
    losses = []
    for _ in range(6):
        loss = flow.loss(*engine(x, y, sigma), sigma)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step(lr=1e-3, ema_decay=0.99)
    return losses


if __name__ == "__main__":
    from tarflow_dist import distributed

    distributed.init()
    print(json.dumps({f"{case} {stage}": train(case, stage) for case in ALL for stage in STAGES}))
