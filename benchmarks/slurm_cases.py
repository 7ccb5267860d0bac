"""What a training run goes through on a cluster, and what it costs: a row a case for README.md.

    python benchmarks/slurm_cases.py [CASE …]     # as root, with Slurm installed

Starts the tests' cluster of two nodes, trains a tiny model on the digits with two CPU ranks on
each, strikes it in the middle, and compares its curve with torchrun's four ranks, without Slurm.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "slurm")]

import strikes  # noqa: E402
from cluster import Cluster  # noqa: E402
from strikes import BATCH, RANKS, TINY, Launcher, images_logged, until  # noqa: E402

COLUMNS = (
    *("done to the run", "ends as", "restarts", "images recomputed", "s until it runs again"),
    *("s until it trains again", "curve to the last bit as without Slurm"),
)
IMAGES = 320 * BATCH
STRIKE_AT = 130 * BATCH
EVERY = 50 * BATCH


def kill_rank(launch: Launcher, job: str) -> None:
    """Kills one rank of the second node, as the kernel does when memory runs out."""
    launch.cluster.run("srun", "--overlap", f"--jobid={job}", "--nodelist=n2", "-N1", "-n1", *KILL)


KILL = ("bash", "-c", "pkill --oldest --signal KILL --full submitit.core._submi[t]")


def stop_and_launch_again(launch: Launcher, job: str) -> None:
    launch("stop", RUN["folder"])
    launch.submit(*RUN["arguments"])


RUN: dict = {}
CASES: dict[str, tuple[str, Callable[[Launcher, str], None] | None]] = {
    "nothing": ("nothing", None),
    "usr2": ("`scancel --signal=USR2`", strikes.send_usr2),
    "preempt": ("a job in a higher partition takes the nodes", strikes.preempt),
    "limit": ("the time limit comes near", strikes.reach_time_limit),
    "stop": ("`launch.py stop`, and the same command again", stop_and_launch_again),
    "requeue": ("`scontrol requeue`, without warning", strikes.requeue),
    "rank": ("`kill -9` of one rank", kill_rank),
    "node": ("a node loses power", strikes.kill_node),
}


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="cases-") as folder, Cluster() as cluster:
        launch, runs = Launcher(cluster), Path(folder)
        subprocess.run(
            [sys.executable, "-m", "data_prep", "digits", str(runs / "digits")],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        arguments = [
            *TINY,
            f"data.path={runs / 'digits' / 'mds'}",
            f"train.images={IMAGES}",
            f"checkpoint.every_images={EVERY}",
        ]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
        alone = [*torchrun, "-m", "tarflow_dist.train", *arguments, f"run={runs / 'alone'}"]
        subprocess.run([sys.executable, *alone], cwd=ROOT, env=launch.environment, check=True)
        print(" | ".join(["", *COLUMNS, ""]).strip(), "|---" * len(COLUMNS) + "|", sep="\n")
        for name in names or CASES:
            print(row(launch, name, runs / name, arguments, losses(runs / "alone")), flush=True)


def row(launch: Launcher, name: str, run: Path, arguments: list[str], expected: list[float]) -> str:
    what, strike = CASES[name]
    ranks = [*RANKS, "--tasks-per-node=2", "--time=30", "--signal-delay=120"]
    RUN.update(folder=run, arguments=[*ranks, *arguments, f"run={run}"])
    (job,) = launch.submit(*RUN["arguments"])
    recomputed, running, training = 0, 0.0, 0.0
    if strike is not None:
        strikes.wait_for_images(run, STRIKE_AT)
        began = time.monotonic()
        seen = [images_logged(run)]

        def resumed() -> bool:
            seen.append(max(seen[-1], images_logged(run)))
            return len(starts(run)) > 1

        strike(launch, job)
        until(resumed, "the run to go on")
        running = seconds_to_start(launch, run, began)
        at = starts(run)[-1]
        until(lambda: images_logged(run) > at, "the first step")
        training = time.monotonic() - began
        recomputed = max(seen) - at
    last = json.loads(sorted(run.glob("slurm/*/job.json"))[-1].read_text())["job_id"]
    state = launch.end(last)
    equal = "yes" if losses(run) == expected else "NO"
    restarts = launch.starts(last) - 1
    times = [f"{running:.0f}", f"{training:.0f}"] if strike else ["", ""]
    return " | ".join(["", what, state, str(restarts), str(recomputed), *times, equal, ""]).strip()


def starts(run: Path) -> list[int]:
    """The images from which each start of the run went on."""
    found = []
    for log in sorted(run.glob("slurm/*/*_0_log.err")):
        for line in log.read_text().splitlines():
            if line.startswith(f"{run}: starting"):
                found.append(0)
            elif line.startswith(f"{run}: going on at "):
                found.append(int(line.removeprefix(f"{run}: going on at ").split()[0]))
    return found


def seconds_to_start(launch: Launcher, run: Path, began: float) -> float:
    """From `began`, on the monotonic clock, to when Slurm last started the run's newest job."""
    last = json.loads(sorted(run.glob("slurm/*/job.json"))[-1].read_text())["job_id"]
    told = launch.cluster.run("squeue", "-h", "-j", last, "-o", "%S").strip()
    start = time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S"))
    return start - (time.time() - (time.monotonic() - began))


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == list(range(BATCH, IMAGES + 1, BATCH))
    return [row["loss"] for row in rows]


if __name__ == "__main__":
    main(sys.argv[1:])
