"""What goes wrong around a run: nobody reads its output, a disk is full, things are not what they
should be, there is no network."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, command

from tarflow_dist import config_file as configs
from tarflow_dist.telemetry.throughput import Throughput
from tarflow_dist.training import run_log
from tarflow_dist.training.checkpoint import RunState
from tarflow_dist.training.run_folder import read_status
from tarflow_dist.training.run_log import RunLog

SHORT = [
    "configs/digits.yaml",
    *("train.images=320", "train.batch_size=64", "optimizer.warmup_images=64"),
    *("checkpoint.every_images=64", "log.every_images=64", "log.wandb=disabled"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def finished(run: Path) -> bool:
    return (run / "checkpoints" / "latest").read_text().strip() == "00000000320"


@pytest.mark.parametrize("how", ["| head -1", "2>&1 | true", ">&- 2>&-", ">/dev/full 2>&1"])
def test_output_that_nobody_reads_is_dropped(how: str, digits: Path, tmp_path: Path) -> None:
    """The run goes on to its end, and ends well."""
    arguments = [*SHORT, f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}"]
    line = " ".join(command("tarflow_dist.train", *arguments))
    script = f"set -o pipefail; {line} {how}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "run")
    assert read_status(tmp_path / "run")["state"] == "finished"
    assert b"Traceback" not in done.stderr


def test_two_ranks_go_on_without_a_reader(digits: Path, tmp_path: Path) -> None:
    arguments = [*SHORT, f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}"]
    line = " ".join(command("tarflow_dist.train", *arguments, ranks=2))
    script = f"set -o pipefail; {line} 2>&1 | true"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0
    assert finished(tmp_path / "run")


def test_a_run_whose_folder_is_removed_saves_what_it_has(digits: Path, tmp_path: Path) -> None:
    arguments = [*SHORT, f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}"]
    process = subprocess.Popen(
        command("tarflow_dist.train", *arguments, "train.images=6400"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "checkpoints" / "latest").exists():
        assert process.poll() is None
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    _, said = process.communicate()
    assert "Traceback" not in said
    assert process.returncode in (0, 2)
    if process.returncode == 0:
        latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
        assert latest == "00000006400"


def test_a_table_that_is_cut_off_is_no_error(digits: Path, tmp_path: Path) -> None:
    sheet = f"--sheet {tmp_path}/sheet.png"
    script = f"set -o pipefail; {sys.executable} -m data_prep show {digits} {sheet} | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("set ")


@pytest.mark.parametrize("up", [False, True])
def test_without_any_network(up: bool, digits: Path, tmp_path: Path) -> None:
    """An answer at once, or with a loopback interface all as ever."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("only root may take the network away")
    arguments = [*SHORT, f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}"]
    line = " ".join(command("tarflow_dist.train", *arguments))
    script = f"ip link set lo up; {line}" if up else line
    if up and shutil.which("ip") is None:
        pytest.skip("there is no ip to bring an interface up")
    done = subprocess.run(
        ["unshare", "-n", "bash", "-c", script],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (0 if up else 2)
    assert up or done.stderr.splitlines()[-1].startswith("error: there is no network here")


def test_a_refused_start_leaves_the_run_as_it_was(digits: Path, tmp_path: Path) -> None:
    """Sent back to its second checkpoint, with other settings and something that is refused."""
    run = tmp_path / "run"
    arguments = [*SHORT, f"run={run}", f"data.path={digits / 'mds'}", "data.groups=4"]
    subprocess.run(command("tarflow_dist.train", *arguments), cwd=ROOT, env=ENVIRONMENT, check=True)
    (run / "checkpoints" / "latest").write_text("00000000256\n")

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    before = content()
    missing = tmp_path / "without" / "tensorboard" / "__init__.py"
    missing.parent.mkdir(parents=True)
    missing.write_text("raise ImportError")
    path = os.pathsep.join([str(missing.parents[1]), str(ROOT)])
    for refused, sentence in (
        ("log.tensorboard=true", b"TensorBoard is not installed"),
        ("data.groups=8", b"began with data.groups 4"),
    ):
        done = subprocess.run(
            command("tarflow_dist.train", *arguments, "optimizer.lr=2e-4", refused),
            cwd=ROOT,
            env=ENVIRONMENT | {"PYTHONPATH": path},
            capture_output=True,
        )
        assert done.returncode == 2
        assert sentence in done.stderr
        assert content() == before


def test_pictures_and_status_never_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    config = configs.load(ROOT / "configs" / "digits.yaml", [f"run={tmp_path}", *SHORT[1:]])
    state = RunState(images=320)
    throughput = Throughput(config, torch.device("cpu"), 320)
    with RunLog(config, state, [], throughput):
        monkeypatch.setattr(run_log, "plot_loss", full)
    assert read_status(tmp_path)["state"] == "finished"
    assert "no loss.png (No space left on device)" in capsys.readouterr().err
    with RunLog(config, state, [], throughput) as written:
        monkeypatch.setattr(run_log.run_folder, "write_status", full)
        written.record_status()
    assert "status.json can't be written (No space left on device)" in capsys.readouterr().err
