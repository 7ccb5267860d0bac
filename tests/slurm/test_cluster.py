"""Jobs on a real Slurm cluster of two nodes, with CPU ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import strikes
from strikes import BATCH, RANKS, ROOT, TINY, Launcher, images_logged, until, wait_for_images

from tarflow_dist.telemetry.metrics import read_metrics

IMAGES = 400 * BATCH
EVENTS = [
    strikes.send_usr2,
    strikes.preempt,
    strikes.requeue,
    strikes.kill_node,
    strikes.reach_time_limit,
]


def curve(run: Path) -> list[tuple[float, float]]:
    return [(row["images"], row["loss"]) for row in read_metrics(run)]


@pytest.fixture
def config(digits: Path) -> list[str]:
    return [
        *TINY,
        f"data.path={digits / 'mds'}",
        f"train.images={IMAGES}",
        f"checkpoint.every_images={20 * BATCH}",
        "log.wandb=disabled",
    ]


@pytest.mark.e2e
def test_a_run_survives_all_that_a_cluster_does_to_it(
    launch: Launcher, config: list[str], tmp_path: Path
) -> None:
    """Signal, preemption, requeue, a lost node and the time limit, one after another in one run;
    then sample_fid on both nodes. The curve is that of torchrun's two ranks, to the last bit."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    sample = "sample_fid --num-samples 20 --batch-size 5 --features pixels"
    job, sampling = launch.submit(
        *(*RANKS, "--time=30", "--signal-delay=120", "--then", sample), *config, f"run={run}"
    )
    for number, strike in enumerate(EVENTS):
        wait_for_images(run, (number + 1) * IMAGES // 10)
        strike(launch, job)
        until(lambda n=number: launch.starts(job) == n + 2, f"restart after {strike.__name__}")
    assert "already" in launch(*RANKS, *config, f"run={run}", code=2)
    told = launch("status", run)
    assert f"job {job} " in told
    assert "5 restarts" in told
    assert launch.end(job) == "COMPLETED"

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "tarflow_dist.train", *config, f"run={alone}"],
        cwd=ROOT,
        env=launch.environment,
        check=True,
    )
    assert [images for images, _ in curve(run)] == list(range(BATCH, IMAGES + 1, BATCH))
    assert curve(run) == curve(alone)

    assert launch.end(sampling) == "COMPLETED"
    result = json.loads((run / "samples" / f"{IMAGES:011d}" / "result.json").read_text())
    assert result["world_size"] == 2
    assert result["num_samples"] == 20


@pytest.mark.e2e
def test_stop_saves_and_the_same_command_goes_on(
    launch: Launcher, config: list[str], tmp_path: Path
) -> None:
    """Two ranks a node. The checkout that it is launched from goes while the job waits."""
    run, checkout = tmp_path / "run", tmp_path / "checkout"
    for room in ("slurm", "tarflow_dist", "data_prep", "configs"):
        shutil.copytree(ROOT / room, checkout / room)
    arguments = [*RANKS, "--tasks-per-node=2", *config, f"run={run}"]
    sample = "sample_fid --num-samples 20 --features pixels"
    job, sampling = launch.submit("--slurm=hold=yes", "--then", sample, *arguments, cwd=checkout)
    shutil.rmtree(checkout / "tarflow_dist")
    launch.cluster.run("scontrol", "release", job)
    wait_for_images(run, BATCH)
    told = launch("stop", run)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert 0 < status["images"] < IMAGES
    assert int((run / "checkpoints" / "latest").read_text()) == status["images"]
    assert f"saved at {status['images']:,} images" in told
    assert launch.end(job) == "FAILED"
    assert launch.end(sampling) == "CANCELLED"
    assert launch.starts(job) == 1

    (job,) = launch.submit(*arguments, f"train.images={status['images'] + 10 * BATCH}")
    assert launch.end(job) == "COMPLETED"
    assert images_logged(run) == status["images"] + 10 * BATCH


@pytest.mark.e2e
def test_a_job_that_crashes_at_its_start_is_given_up_with_the_reason(
    launch: Launcher, config: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    missing = tmp_path / "nowhere"
    arguments = [*RANKS, "--attempts=2", *config, f"run={run}", f"data.path={missing}"]
    assert f"no shards {missing}" in launch(*arguments, code=2)
    (job,) = launch.submit("--force", *arguments)
    assert launch.end(job) == "FAILED"
    assert launch.starts(job) == 2
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    for part in ("ended 2 times in a row without progress", "node n", str(missing)):
        assert part in status["reason"]
    assert status["reason"] in launch("status", run)


def test_what_cant_work_is_refused(launch: Launcher, config: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = launch(*RANKS, "--partition=hihg", *config, f"run={run}", code=2)
    assert told.endswith("error: there is no partition hihg: choose among high, low\n")
    told = launch(*RANKS, "--nodelist=n7", *config, f"run={run}", code=2)
    assert "error: Slurm refuses the job: " in told
    assert "n7" in told
    assert launch("stop", run, code=2)
