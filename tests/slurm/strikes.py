"""What happens to jobs on a cluster, for the tests and for benchmarks/slurm_cases.py."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import NODES, SPARE, Cluster

ROOT = Path(__file__).parents[2]
BATCH = 32
TINY = [
    "configs/digits.yaml",
    "model.num_blocks=2",
    "model.layers_per_block=1",
    f"train.batch_size={BATCH}",
    "train.zero_stage=2",
    "optimizer.warmup_images=0",
    "optimizer.schedule=constant",  # the curve is the same whatever the run's length
    "log.wandb=disabled",
    f"log.every_images={BATCH}",
]
RANKS = ["--nodes=2", "--gpus-per-node=0", "--cpus=1"]
PATIENCE = 180


class Launcher:
    """`python slurm/launch.py` on `cluster`, as a user runs it."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.environment = os.environ | cluster.environment | {"OMP_NUM_THREADS": "1"}

    def __call__(self, *arguments: object, code: int = 0, cwd: Path = ROOT) -> str:
        """What the command prints; fails unless it exits with `code`."""
        done = subprocess.run(
            [sys.executable, "slurm/launch.py", *map(str, arguments)],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *arguments: object, cwd: Path = ROOT) -> list[str]:
        """The ids of the submitted jobs."""
        return re.findall(r"^job (\d+):", self(*arguments, cwd=cwd), re.MULTILINE)

    def state(self, job: str) -> str:
        """Slurm's word for the job's state."""
        return self.cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def starts(self, job: str) -> int:
        """How often Slurm has started the job."""
        told = self.cluster.run("sacct", "-n", "-X", "-D", "-j", job, "-o", "State")
        return len(told.split())

    def wait(self, job: str, *states: str) -> str:
        """Until the job is in one of `states`."""
        until(lambda: self.state(job) in states, f"job {job} to be {states}")
        return self.state(job)

    def end(self, job: str) -> str:
        """Waits for the job's end and returns its last state."""
        return self.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE} s for {what}")
        time.sleep(0.1)


def images_logged(run: Path) -> int:
    """Images at the last whole row of the run's metrics; 0 before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return int(rows[-1]["images"]) if rows else 0


def curve(run: Path) -> list[tuple[float, float]]:
    """Images and loss of every row of the run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(row["images"], row["loss"]) for row in map(json.loads, lines)]


def wait_for_images(run: Path, images: int) -> None:
    until(lambda: images_logged(run) >= images, f"{run} to reach {images} images")


def send_usr2(launch: Launcher, job: str) -> None:
    """As Slurm does before the time limit."""
    launch.cluster.run("scancel", "--signal=USR2", job)


def requeue(launch: Launcher, job: str) -> None:
    """Without any warning."""
    launch.cluster.run("scontrol", "requeue", job)


def preempt(launch: Launcher, job: str) -> None:
    """By a job of a higher partition, which takes both nodes for a moment."""
    launch.cluster.run(
        *("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"),
        "--wrap=true",
    )


def reach_time_limit(launch: Launcher, job: str) -> None:
    """Brings the limit so near that the warning signal is due, and back once it has been sent."""
    starts = launch.starts(job)
    launch.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=3")
    until(lambda: launch.starts(job) > starts, f"job {job} to be requeued")
    launch.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=30")


def kill_node(launch: Launcher, job: str) -> None:
    """The second node loses power; another is ready to take its place."""
    launch.cluster.kill_node(NODES[1])
    launch.cluster.start_node(SPARE)
