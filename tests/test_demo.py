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


def test_samples_that_are_not_all_written_are_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, they have figures and no samples.npz yet, which the demo reads."""
    monkeypatch.chdir(tmp_path)
    for folder in (demo.GUIDED, demo.UNGUIDED):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
    with (
        mock.patch("subprocess.Popen") as popen,
        mock.patch.object(demo, "report"),
        mock.patch("torch.cuda.device_count", return_value=0),
    ):
        popen.return_value.wait.return_value = 0
        demo.main([])
    started = [" ".join(map(str, call.args[0])) for call in popen.call_args_list]
    assert any("tarflow_dist.sample_fid" in command for command in started)


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
