"""Jobs on a real Slurm cluster of two nodes, with CPU ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import strikes
from commands import run as run_module
from strikes import (
    BATCH,
    RANKS,
    ROOT,
    TINY,
    Launcher,
    curve,
    images_logged,
    until,
    wait_for_images,
)

STRIKES = [
    strikes.send_usr2,
    strikes.preempt,
    strikes.requeue,
    strikes.reach_time_limit,
    strikes.kill_node,
]
SAMPLE = "sample_fid --num-samples 20 --batch-size 5 --features pixels"


@pytest.fixture
def config(digits: Path) -> list[str]:
    return [*TINY, f"data.path={digits / 'mds'}", f"checkpoint.every_images={20 * BATCH}"]


@pytest.mark.e2e
def test_a_run_survives_all_that_a_cluster_does_to_it(
    launch: Launcher, config: list[str], tmp_path: Path
) -> None:
    """A signal, preemption, a requeue, a lost node and the time limit hit one run, one after
    another; it is stopped, and the same command finishes it. Its curve is that of torchrun's two
    ranks to the last bit."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    arguments = [*RANKS, "--time=30", "--signal-delay=120", *config, f"run={run}"]
    endless = [*arguments, f"train.images={10**7}"]
    job, sampling = launch.submit("--then", SAMPLE, *endless)
    for number, strike in enumerate(STRIKES):
        wait_for_images(run, images_logged(run) + 10 * BATCH)
        strike(launch, job)
        until(lambda n=number: launch.starts(job) == n + 2, f"restart after {strike.__name__}")
        until(lambda n=number: count_starts(run) == n + 2, f"training after {strike.__name__}")
    assert f"job {job} (RUNNING) is at {run} already" in launch(*endless, code=2)
    told = launch("status", run)
    assert f"job {job} RUNNING (n[1,3]), 5 restarts" in told

    wait_for_images(run, images_logged(run) + 10 * BATCH)
    told = launch("stop", run)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert int((run / "checkpoints" / "latest").read_text()) == status["images"]
    assert f"saved at {status['images']:,} images" in told
    assert launch.end(job) == "FAILED"
    assert launch.end(sampling) == "CANCELLED"  # it was to follow a finished run

    images = status["images"] + 10 * BATCH
    (job,) = launch.submit(*arguments, f"train.images={images}")
    assert launch.end(job) == "COMPLETED"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = ["-m", "tarflow_dist.train", *config, f"train.images={images}", f"run={alone}"]
    command = [sys.executable, "-m", *torchrun, *train]
    subprocess.run(command, cwd=ROOT, env=launch.environment, check=True)
    assert [row[0] for row in curve(run)] == list(range(BATCH, images + 1, BATCH))
    assert curve(run) == curve(alone)


@pytest.mark.e2e
def test_two_ranks_a_node_train_and_sample_what_was_submitted(
    launch: Launcher, config: list[str], tmp_path: Path
) -> None:
    """The checkout that it is launched from changes while the job waits."""
    run, alone, checkout = tmp_path / "run", tmp_path / "alone", tmp_path / "checkout"
    for room in ("slurm", "tarflow_dist", "data_prep", "configs"):
        shutil.copytree(ROOT / room, checkout / room)
    config = [*config, f"train.images={30 * BATCH}"]
    options = [*RANKS, "--tasks-per-node=2", "--slurm=hold", "--then", SAMPLE]
    job, sampling = launch.submit(*options, *config, f"run={run}", cwd=checkout)
    shutil.rmtree(checkout / "tarflow_dist")
    launch.cluster.run("scontrol", "release", f"{job},{sampling}")
    run_module("tarflow_dist.train", *config, f"run={alone}")
    assert launch.end(job) == "COMPLETED"
    for (images, loss), expected in zip(curve(run), curve(alone), strict=True):
        assert (images, pytest.approx(loss, abs=1e-5)) == expected
    assert launch.end(sampling) == "COMPLETED"
    result = json.loads((run / "samples" / f"{30 * BATCH:011d}" / "result.json").read_text())
    assert result["world_size"] == 4
    assert result["num_samples"] == 20


@pytest.mark.e2e
def test_a_job_that_crashes_at_its_start_is_given_up_with_the_reason(
    launch: Launcher, config: list[str], tmp_path: Path
) -> None:
    run, missing = tmp_path / "run", tmp_path / "nowhere"
    config = [*config, f"run={run}", f"data.path={missing}"]
    arguments = [*RANKS, "--attempts=2", *config]
    assert f"there are no shards {missing}" in launch(*arguments, code=2)
    (job,) = launch.submit("--force", *arguments)
    assert launch.end(job) == "FAILED"
    assert launch.starts(job) == 2
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    for part in ("ended 2 times in a row without progress", "node n", str(missing)):
        assert part in status["error"]
    assert status["error"] in launch("status", run)


def test_what_cant_work_is_refused(launch: Launcher, config: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = launch(*RANKS, "--partition=hihg", *config, f"run={run}", code=2)
    assert told.endswith("error: there is no partition hihg: choose among high, low\n")
    told = launch(*RANKS, "--nodelist=n7", *config, f"run={run}", code=2)
    assert "error: Slurm refuses the job: " in told
    assert "Invalid node name" in told
    assert "no job was submitted" in launch("status", run, code=2)
    assert "no job was submitted" in launch("stop", run, code=2)


def count_starts(run: Path) -> int:
    """How often training has begun or gone on, by rank 0's log."""
    (log,) = run.glob("slurm/*-train/*_0_log.err")
    lines = log.read_text().splitlines()
    return sum(line.startswith((f"{run}: starting", f"{run}: going on")) for line in lines)
