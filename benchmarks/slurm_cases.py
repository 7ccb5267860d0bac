"""What a cluster can do to a training run, and what it costs: a row a case for README.md.

    python benchmarks/slurm_cases.py [CASE …]     # as root, with Slurm installed

Starts the tests' cluster of two nodes. For each case a tiny model trains on the digits with two CPU
ranks on each node, is struck in the middle, and after it has gone on for a while is compared with
torchrun's four ranks, which train without Slurm.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "slurm")]

import strikes  # noqa: E402
from cluster import Cluster  # noqa: E402
from strikes import BATCH, RANKS, TINY, Launcher, images_logged, until  # noqa: E402

STRIKE_AT = 110 * BATCH
EVERY = 50 * BATCH  # between checkpoints
AFTERWARDS = 20 * BATCH
COLUMNS = (
    *("done to the run", "restarts", "images recomputed", "s until it runs again"),
    *("s until it trains again", "loss at its end", "without Slurm"),
)


@dataclass(frozen=True)
class Run:
    """A run of one case: its folder, and how it is launched."""

    folder: Path
    arguments: list[str]

    @property
    def job(self) -> str:
        """The id of its newest job."""
        record = sorted(self.folder.glob("slurm/*/job.json"))[-1]
        return str(json.loads(record.read_text())["job_id"])

    def starts(self) -> list[int]:
        """The images from which each of its starts went on."""
        found = []
        for log in sorted(self.folder.glob("slurm/*/*_0_log.err")):
            for line in log.read_text().splitlines():
                if line.startswith(f"{self.folder}: starting"):
                    found.append(0)
                elif line.startswith(f"{self.folder}: going on at "):
                    found.append(int(line.removeprefix(f"{self.folder}: going on at ").split()[0]))
        return found


def struck_by(strike: Callable[[Launcher, str], None]) -> Callable[[Launcher, Run], None]:
    return lambda launch, run: strike(launch, run.job)


def kill_rank(launch: Launcher, run: Run) -> None:
    """One rank of the second node, as the kernel does when memory runs out."""
    # the node's processes are a namespace of their own
    kill = "kill -KILL $(pgrep --oldest --full submitit.core._submi[t])"
    on_node = ("--overlap", f"--jobid={run.job}", "--nodelist=n2", "--nodes=1", "--ntasks=1")
    launch.cluster.run("srun", *on_node, "bash", "-c", kill, check=False)


def stop_and_launch_again(launch: Launcher, run: Run) -> None:
    launch("stop", run.folder)
    launch.submit(*run.arguments)


CASES: dict[str, tuple[str, Callable[[Launcher, Run], None]]] = {
    "usr2": ("`scancel --signal=USR2`", struck_by(strikes.send_usr2)),
    "preempt": ("a job of a higher partition takes its nodes", struck_by(strikes.preempt)),
    "limit": ("the time limit comes near", struck_by(strikes.reach_time_limit)),
    "stop": ("`launch.py stop`, and the same command again", stop_and_launch_again),
    "requeue": ("`scontrol requeue`, without warning", struck_by(strikes.requeue)),
    "rank": ("`kill -9` of a rank", kill_rank),
    "node": ("a node loses power", struck_by(strikes.kill_node)),
}


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="cases-") as folder, Cluster() as cluster:
        launch, runs = Launcher(cluster), Path(folder)
        prepare = [sys.executable, "-m", "data_prep", "digits", str(runs / "digits")]
        subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
        config = [
            *TINY,
            f"data.path={runs / 'digits' / 'mds'}",
            f"checkpoint.every_images={EVERY}",
        ]
        rows = [case(launch, name, runs / name, config) for name in names or CASES]

        longest = max(int(images) for _, _, curve in rows for images, _ in curve)
        alone = [*config, f"run={runs / 'alone'}", f"train.images={longest}"]
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=4"]
        command = [sys.executable, "-m", *torchrun, "-m", "tarflow_dist.train", *alone]
        subprocess.run(command, cwd=ROOT, env=launch.environment, check=True)
        expected = strikes.curve(runs / "alone")
        print_row(COLUMNS)
        print_row(["---"] * len(COLUMNS))
        for what, figures, curve in rows:
            same = "the same, every step" if curve == expected[: len(curve)] else "DIFFERENT"
            print_row([what, *figures, f"{curve[-1][1]:.6f}", same])


def case(
    launch: Launcher, name: str, folder: Path, config: list[str]
) -> tuple[str, list[str], list[tuple[float, float]]]:
    """What was done, the figures, and the curve."""
    what, strike = CASES[name]
    ranks = [*RANKS, "--tasks-per-node=2", "--time=30", "--signal-delay=120"]
    run = Run(folder, [*ranks, *config, f"run={folder}", f"train.images={10**7}"])
    launch.submit(*run.arguments)
    strikes.wait_for_images(folder, STRIKE_AT)
    began, seen = time.time(), images_logged(folder)

    def goes_on() -> bool:
        nonlocal seen
        if len(run.starts()) > 1:
            return True
        seen = max(seen, images_logged(folder))
        return False

    strike(launch, run)
    until(goes_on, "training to go on")
    resumed = run.starts()[-1]
    strikes.wait_for_images(folder, resumed + BATCH)
    trains = time.time() - began
    told = launch.cluster.run("squeue", "--noheader", "--jobs", run.job, "--format=%S").strip()
    runs = time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S")) - began
    strikes.wait_for_images(folder, resumed + AFTERWARDS)
    restarts = launch.starts(run.job) - 1
    launch("stop", folder)
    figures = [str(restarts), str(seen - resumed), f"{runs:.0f}", f"{trains:.0f}"]
    print(what, *figures, file=sys.stderr, flush=True)
    return what, figures, strikes.curve(folder)


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
