"""`python -m tarflow_dist.train` as a user runs it, on one process and under torchrun."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import ROOT, command, processes_of, run

from tarflow_dist.files import lock_folder
from tarflow_dist.telemetry.metrics_log import read_metrics
from tarflow_dist.training.checkpoint import Checkpoint
from tarflow_dist.training.latest_checkpoint import newest

BATCH = 32
# 50 steps at a constant learning rate, a row of metrics for each
CURVE = [
    "configs/digits.yaml",
    f"train.images={50 * BATCH}",
    f"train.batch_size={BATCH}",
    "optimizer.lr=1e-4",
    "optimizer.schedule=constant",
    "optimizer.warmup_images=0",
    f"log.every_images={BATCH}",
    f"eval.every_images={10 * BATCH}",
    "eval.count=100",
    "data.groups=4",
    "log.wandb=disabled",
]
TIMING = (
    "images_per_second",
    "data_wait",
    "slowest_rank_lag",
    "memory_gib",
    "checkpoint_stall_seconds",
    "val_seconds",
)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def val_losses(folder: Path) -> dict[int, float]:
    return {r["images"]: r["val_loss"] for r in read_metrics(folder) if "val_loss" in r}


def rows_without_timing(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(folder)]


def largest_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == 50
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps in fp32 on one process."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run("tarflow_dist.train", *CURVE, f"run={folder}", f"data.path={digits / 'mds'}")
    return folder


def test_a_run_leaves_what_it_promises(unbroken: Path) -> None:
    assert len(losses(unbroken)) == 50
    status = json.loads((unbroken / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["images"] == status["total_images"] == 50 * BATCH
    environment = json.loads((unbroken / "environment.json").read_text())
    assert environment["torch"]
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (unbroken / "checkpoints" / "latest").read_text().strip() == f"{50 * BATCH:011d}"


@pytest.mark.e2e
@pytest.mark.parametrize(
    "overrides",
    [["train.micro_batch_size=4", "train.zero_stage=2"], ["train.zero_stage=3"]],
)
def test_the_curve_is_the_same_on_two_ranks(
    overrides: list[str], unbroken: Path, digits: Path, tmp_path: Path
) -> None:
    """The other shard format, too: both hold the same images in the same order."""
    folder = tmp_path / "two"
    where = [f"run={folder}", f"data.path={digits / 'wds'}"]
    run("tarflow_dist.train", *CURVE, *where, *overrides, ranks=2)
    assert largest_difference(losses(folder), losses(unbroken)) < 1e-5
    assert val_losses(folder) == pytest.approx(val_losses(unbroken), abs=1e-6)


@pytest.mark.e2e
def test_the_held_out_loss_is_the_finished_models(unbroken: Path, digits: Path, tmp_path: Path):
    """As evaluate_bpd measures it, once more on all images of the val split."""
    folder, model = tmp_path / "run", tmp_path / "model"
    where = [f"run={folder}", f"data.path={digits / 'mds'}"]
    run("tarflow_dist.train", *CURVE, *where, "eval.count=null", "train.zero_stage=0")
    run("tarflow_dist.convert", folder, model)
    said = run("tarflow_dist.evaluate_bpd", "--model", model, "--data", digits / "mds").stdout
    measured = val_losses(folder)
    assert list(measured) == [n * BATCH for n in (10, 20, 30, 40, 50)]
    assert f"{measured[50 * BATCH]:.5f} nats" in said
    assert measured[50 * BATCH] < measured[10 * BATCH]
    assert val_losses(unbroken).keys() == measured.keys()
    assert val_losses(unbroken) != pytest.approx(measured, abs=1e-3)  # 100 of the 297 images


@pytest.mark.e2e
def test_bf16_stays_close(unbroken: Path, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    where = [f"run={folder}", f"data.path={digits / 'mds'}"]
    run("tarflow_dist.train", *CURVE, *where, "train.precision=bf16")
    difference = largest_difference(losses(folder), losses(unbroken))
    assert 0 < difference < 1e-2


def start(arguments: list[str], ranks: int) -> subprocess.Popen:
    # a session of its own, so that one signal reaches all its processes, as Ctrl-C does
    return subprocess.Popen(
        command("tarflow_dist.train", *arguments, ranks=ranks),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_row(folder: Path, images: int) -> None:
    """Until the run's metrics hold a row at or past `images`."""
    file = folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if file.exists() and any(row["images"] >= images for row in read_metrics(folder)):
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder} never reached {images} images")


@pytest.mark.e2e
@pytest.mark.parametrize("at_step", [5, 25])
def test_killed_and_started_again_it_goes_on_to_the_last_bit(
    at_step: int, unbroken: Path, digits: Path, tmp_path: Path
) -> None:
    """With SIGKILL, before the first checkpoint and after it."""
    folder = tmp_path / "killed"
    arguments = [
        *CURVE,
        f"run={folder}",
        f"data.path={digits / 'mds'}",
        f"checkpoint.every_images={10 * BATCH}",
    ]
    process = start(arguments, ranks=1)
    wait_for_row(folder, at_step * BATCH)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(folder)) < 50
    run("tarflow_dist.train", *arguments)
    assert rows_without_timing(folder) == rows_without_timing(unbroken)


@pytest.mark.e2e
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_leaves_with_a_sentence(
    ranks: int, unbroken: Path, digits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    arguments = [*CURVE, f"run={folder}", f"data.path={digits / 'mds'}"]
    process = start(arguments, ranks)
    wait_for_row(folder, 5 * BATCH)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert "interrupted and saved; the same command goes on" in stderr
    if ranks == 1:  # torchrun has an exit code of its own
        assert process.returncode == 75
        assert "Traceback" not in stderr
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert int((folder / "checkpoints" / "latest").read_text()) == status["images"]
    run("tarflow_dist.train", *arguments, ranks=ranks)
    assert largest_difference(losses(folder), losses(unbroken)) < 1e-5


@pytest.mark.e2e
def test_ranks_end_with_a_killed_torchrun(unbroken: Path, digits: Path, tmp_path: Path) -> None:
    """They save first, and the run goes on as ever."""
    folder = tmp_path / "orphaned"
    arguments = [*CURVE, f"run={folder}", f"data.path={digits / 'mds'}"]
    process = start(arguments, ranks=2)
    wait_for_row(folder, 5 * BATCH)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while processes_of(str(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    run("tarflow_dist.train", *arguments, ranks=2)
    assert largest_difference(losses(folder), losses(unbroken)) < 1e-5


@pytest.mark.e2e
def test_an_itarflow_trains_alike_on_two_ranks_and_after_a_kill(
    digits: Path, tmp_path: Path
) -> None:
    """And is previewed, measured and sampled as any other model."""
    arguments = [*CURVE, "model.sigma=null", "model.sigma_range=[0.05, 0.2]"]
    arguments += ["train.loss_weight=sigma", f"data.path={digits / 'mds'}"]
    arguments += [f"checkpoint.every_images={10 * BATCH}", f"preview.every_images={50 * BATCH}"]
    alone, killed, two = (tmp_path / name for name in ("alone", "killed", "two"))
    run("tarflow_dist.train", *arguments, f"run={alone}")
    process = start([*arguments, f"run={killed}"], ranks=1)
    wait_for_row(killed, 15 * BATCH)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run("tarflow_dist.train", *arguments, f"run={killed}")
    assert rows_without_timing(killed) == rows_without_timing(alone)
    run("tarflow_dist.train", *arguments, f"run={two}", "train.zero_stage=3", ranks=2)
    assert largest_difference(losses(two), losses(alone)) < 1e-5
    bands = [sum("loss/sigma" in key for key in row) for row in read_metrics(alone)]
    assert max(bands) == 4
    assert val_losses(two) == pytest.approx(val_losses(alone), abs=1e-6)
    (preview,) = (alone / "previews").iterdir()
    assert preview.read_bytes() == (killed / "previews" / preview.name).read_bytes()
    model, picture = tmp_path / "model", tmp_path / "grid.png"
    run("tarflow_dist.convert", alone, model)
    guided = ["--guidance", "0.5", "--rule", "scale", "--annealed"]
    run("tarflow_dist.sample", model, "--labels", "1,2", *guided, "--out", picture)
    said = run("tarflow_dist.evaluate_bpd", "--model", model, "--data", digits / "mds").stdout
    assert "std 0.05 to 0.2" in said
    where = ["--model", model, "--reference", digits / "mds", "--out", tmp_path / "samples"]
    how = ["--num-samples", 20, "--features", "pixels", "--denoise-steps", 3]
    run("tarflow_dist.sample_fid", *where, *how, ranks=2)
    result = json.loads((tmp_path / "samples" / "result.json").read_text())
    assert result["denoise_steps"] == 3


def test_what_changed_is_said_or_refused(unbroken: Path, digits: Path, tmp_path: Path) -> None:
    where = [f"run={unbroken}", f"data.path={digits / 'wds'}"]
    done = run("tarflow_dist.train", *CURVE, *where)
    assert f"data.path changed from {digits / 'mds'} to {digits / 'wds'}" in done.stderr
    assert "the data are others" not in done.stderr  # but for their format
    done = run("tarflow_dist.train", *CURVE, *where, "model.num_blocks=2", check=False)
    assert done.returncode == 2
    assert "was started with model.num_blocks 4 and can't go on with 2" in done.stderr
    done = run("tarflow_dist.train", *CURVE, *where, "data.groups=8", check=False)
    assert done.returncode == 2
    assert "began with data.groups 4 and can't go on with 8" in done.stderr


def test_a_set_that_was_written_anew_is_noticed(digits: Path, tmp_path: Path) -> None:
    """Under the same path, with other images in train."""
    data = shutil.copytree(digits / "mds", tmp_path / "mds")
    arguments = [*CURVE, f"run={tmp_path / 'run'}", f"data.path={data}", "train.images=64"]
    run("tarflow_dist.train", *arguments)
    arguments.append("train.images=128")
    shutil.rmtree(data)
    run("data_prep", "digits", tmp_path / "again", "--seed", 1, "--format", "mds")
    (tmp_path / "again" / "mds").rename(data)
    said = run("tarflow_dist.train", *arguments).stderr
    assert "going on at 64 images; " in said
    assert "the data are others than before" in said
    assert "the data are others" not in run("tarflow_dist.train", *arguments).stderr


@pytest.mark.e2e
def test_a_run_that_diverges_stops_and_saves_nothing_of_it(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "diverging"
    arguments = [*CURVE, f"run={folder}", f"data.path={digits / 'mds'}", "optimizer.lr=1e30"]
    arguments += [f"checkpoint.every_images={BATCH}", "model.volume_preserving=true"]
    done = run("tarflow_dist.train", *arguments, "health.max_skipped=2", check=False)
    assert done.returncode == 2
    assert "left out the step to " in done.stderr
    assert "is not finite" in done.stderr
    assert "images after going back 2 times: the same command goes on from" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    saved = Checkpoint(newest(folder / "checkpoints"))
    for kind in ("weights", "ema", "buffers"):
        for tensor in saved.read_all(kind).values():
            assert tensor.isfinite().all()


def test_two_jobs_never_write_one_run(unbroken: Path, digits: Path) -> None:
    where = [f"run={unbroken}", f"data.path={digits / 'mds'}"]
    with lock_folder(unbroken):
        done = run("tarflow_dist.train", *CURVE, *where, check=False)
    assert done.returncode == 2
    assert f"another run is writing to {unbroken}" in done.stderr


def test_mistakes_are_told_in_one_line(digits: Path, tmp_path: Path) -> None:
    where = [f"run={tmp_path / 'run'}", f"data.path={digits / 'mds'}"]
    for overrides, sentence in [
        ([f"data.path={tmp_path}/nothing"], "there are no shards at"),
        ([f"data.path={digits}"], "did you mean"),
        (["model.image_size=16"], "model.image_size say (1, 16, 16)"),
        (["model.num_classes=5"], "holds 10 classes, and the model has 5"),
        (["model.num_classes=12"], "holds 10 classes, and the model has 12"),
        (["train.micro_batch_size=5"], "train.batch_size 32 is not divisible by"),
    ]:
        done = run("tarflow_dist.train", *CURVE, *where, *overrides, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert sentence in line
    assert not (tmp_path / "run").exists()
