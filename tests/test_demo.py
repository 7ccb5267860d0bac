"""The demo when it is interrupted: what it started ends with it, and it goes on later."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from commands import processes_of

from tarflow_dist import demo

RANKS_START = "demo/shards/mds/manifest.parquet"  # what is there when they do
RANKS_TRAIN = "demo/run/metrics.jsonl"


@pytest.mark.parametrize(
    ("cards", "machine"),
    [(0, (2, "fp32")), (1, (1, "bf16")), (3, (2, "bf16")), (8, (8, "bf16"))],
)
def test_it_takes_the_cards_that_divide_its_batch(cards: int, machine: tuple[int, str]) -> None:
    with mock.patch("torch.cuda.device_count", return_value=cards):
        assert demo._machine() == machine


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("there", "number"), [(RANKS_START, signal.SIGINT), (RANKS_TRAIN, signal.SIGTERM)]
)
def test_an_interrupted_demo_leaves_nothing_running(
    there: str, number: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen([sys.executable, "-m", "tarflow_dist.demo"], cwd=tmp_path)
    while not (tmp_path / there).exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == 130
    assert processes_of(str(tmp_path)) == []
