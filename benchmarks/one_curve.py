"""One loss curve: the digits for 100 steps at a constant learning rate, in fp32, in every pair of
ZeRO stage, world size, accumulation, activation checkpointing and compilation; and in bf16.

    python benchmarks/one_curve.py WORK

Prints a Markdown table of each cell's largest difference from the first, in nats a dimension.
"""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

from tarflow_dist.telemetry.metrics_log import read_metrics

STEPS, BATCH = 100, 32
# ZeRO stage, ranks, passes a step, recompute activations, compile
CELLS = [
    (1, 1, 1, False, False),
    (0, 1, 2, True, True),
    (0, 2, 1, False, True),
    (0, 4, 2, True, False),
    (1, 2, 2, True, True),
    (1, 4, 1, True, False),
    (2, 1, 2, False, True),
    (2, 2, 1, True, False),
    (2, 4, 2, False, False),
    (3, 1, 1, True, True),
    (3, 2, 2, False, False),
    (3, 4, 1, False, True),
    (1, 1, 2, False, True),
    (2, 1, 1, True, True),
]
BF16 = [(1, "bf16"), (2, "bf16"), (3, "bf16"), (0, "bf16_autocast"), (3, "bf16_autocast")]


def main() -> None:
    check_pairs()
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    digits = work / "digits"
    if not digits.exists():
        subprocess.run([sys.executable, "-m", "data_prep", "digits", digits], check=True)
    print("| precision | stage | ranks | passes | recompute | compile | largest difference |")
    print("|---|---|---|---|---|---|---|")
    first: list[float] = []
    for stage, ranks, passes, recompute, compiled in CELLS:
        settings = [
            f"train.micro_batch_size={BATCH // ranks // passes}",
            f"train.activation_checkpointing={int(recompute)}",
            f"train.compile={compiled}",
        ]
        losses = train(work, digits, "fp32", stage, ranks, *settings)
        first = first or losses
        row = (stage, ranks, passes, "yes" if recompute else "", "yes" if compiled else "")
        show("fp32", *row, difference(losses, first))
    for stage, precision in BF16:
        losses = train(work, digits, precision, stage, 2)
        show(precision, stage, 2, 1, "", "", difference(losses, first))


def check_pairs() -> None:
    """That each value of each setting meets each value of each other one."""
    for a, b in combinations(range(5), 2):
        met = {(cell[a], cell[b]) for cell in CELLS}
        values = [len({cell[i] for cell in CELLS}) for i in (a, b)]
        assert len(met) == values[0] * values[1], (a, b)


def train(
    work: Path, digits: Path, precision: str, stage: int, ranks: int, *settings: str
) -> list[float]:
    run = work / "-".join([precision, str(stage), str(ranks), *settings])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "tarflow_dist.train", "configs/digits.yaml"]
    command += [
        f"run={run}",
        f"data.path={digits / 'mds'}",
        f"train.images={STEPS * BATCH}",
        f"train.batch_size={BATCH}",
        f"train.precision={precision}",
        f"train.zero_stage={stage}",
        "optimizer.lr=1e-4",
        "optimizer.schedule=constant",
        "optimizer.warmup_images=0",
        f"log.every_images={BATCH}",
        "log.wandb=disabled",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *settings], check=True, env=environment, capture_output=True)
    losses = [row["loss"] for row in read_metrics(run)]
    assert len(losses) == STEPS
    return losses


def difference(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def show(*cells: object) -> None:
    *settings, largest = cells
    print("|", *(f"{cell} |" for cell in settings), f"{largest:.1e} |", flush=True)


if __name__ == "__main__":
    main()
