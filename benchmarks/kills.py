"""Kill −9 at random moments, among them while a checkpoint is written: does the run go on exactly?

    python -m benchmarks.kills WORK [KILLS] [--power]

Trains the digits on two ranks, ZeRO stage 2; kills all processes at a random moment; checks that
no announced checkpoint was lost, that each is whole and has all rows of metrics before it; starts
the same command again; and so on. At the end every row is compared with those of an unbroken run.

With --power the run lies on an ext4 file system of its own, which loses all that is not on disk at
each kill, its journal included (needs root).
"""

import argparse
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tarflow_dist.telemetry.metrics_log import read_metrics
from tarflow_dist.training.checkpoint import Checkpoint
from tarflow_dist.training.latest_checkpoint import newest

BATCH, STEPS = 32, 400
TIMING = {
    "images_per_second",
    "data_wait",
    "slowest_rank",
    "slowest_rank_lag",
    "memory_gib",
    "checkpoint_stall_seconds",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("kills", type=int, nargs="?", default=25)
    parser.add_argument("--power", action="store_true")
    args = parser.parse_args()
    work, kills = args.work, args.kills
    work.mkdir(parents=True, exist_ok=True)
    digits = work / "digits"
    if not digits.exists():
        subprocess.run([sys.executable, "-m", "data_prep", "digits", digits], check=True)
    arguments = [
        "configs/digits.yaml",
        f"data.path={digits / 'mds'}",
        f"train.images={STEPS * BATCH}",
        f"train.batch_size={BATCH}",
        "train.zero_stage=2",
        f"checkpoint.every_images={4 * BATCH}",
        f"log.every_images={BATCH}",
        "log.wandb=disabled",
    ]
    start([*arguments, f"run={work / 'unbroken'}"]).wait()
    disk = Disk(work / "disk") if args.power else None
    killed = disk.folder / "killed" if disk else work / "killed"
    chance = random.Random(0)
    writing = 0
    for number in range(1, kills + 1):
        job = start([*arguments, f"run={killed}"])
        in_write = number % 3 == 0  # every third: as soon as a checkpoint is begun
        before = announced(killed)
        wait_for_step(killed, before)
        time.sleep(chance.uniform(0, 2))
        if in_write:
            while not list((killed / "checkpoints").glob(".*.part")) and job.poll() is None:
                time.sleep(0.0005)
        caught = bool(list((killed / "checkpoints").glob(".*.part")))
        if job.poll() is not None:
            print("the run was over before the last kill: raise STEPS")
            break
        if disk:
            disk.lose_power()
        kill(job)
        if disk:
            disk.mount()
        writing += caught
        last = announced(killed)
        assert last >= before, "an announced checkpoint is lost"
        if last:
            Checkpoint(killed / "checkpoints" / f"{last:011d}").verify()
            there = {row["images"] for row in read_metrics(killed)}
            assert there >= set(range(BATCH, last + 1, BATCH)), "rows before it are lost"
        print(f"kill {number}: checkpoint {last}{', while writing one' if caught else ''}")
    assert start([*arguments, f"run={killed}"]).wait() == 0
    same = rows(killed) == rows(work / "unbroken")
    print(
        f"{kills} kills, {writing} while a checkpoint was written: all {STEPS} rows equal: {same}"
    )
    if disk:
        disk.unmount()
    sys.exit(not same)


class Disk:
    """A file system in a file, mounted at `folder`."""

    SHUT_DOWN, WITHOUT_JOURNAL = 0x8004587D, 2  # Linux's EXT4_IOC_SHUTDOWN, …FLAGS_NOLOGFLUSH

    def __init__(self, folder: Path):
        self.folder, self.image = folder, folder.with_suffix(".img")
        folder.mkdir()
        with self.image.open("wb") as image:
            image.truncate(2**30)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)
        self.mount()

    def mount(self) -> None:
        """Once more, if power was lost: only what had reached the disk is there."""
        if self.folder.is_mount():
            self.unmount()
        subprocess.run(["mount", "-o", "loop", self.image, self.folder], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.folder], check=True)

    def lose_power(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(descriptor, self.SHUT_DOWN, struct.pack("I", self.WITHOUT_JOURNAL))
        os.close(descriptor)


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "tarflow_dist.train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


def kill(job: subprocess.Popen) -> None:
    """The launcher, and the ranks, which are in sessions of their own, and their workers."""
    launcher = psutil.Process(job.pid)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes)
    job.wait()


def announced(run: Path) -> int:
    """Images of the checkpoint that the pointer names."""
    checkpoint = newest(run / "checkpoints")
    return int(checkpoint.name) if checkpoint else 0


def wait_for_step(run: Path, images: int) -> None:
    """Until the job has taken a step past `images`, or 5 minutes are over."""
    deadline = time.monotonic() + 300
    began = time.time()
    file = run / "metrics.jsonl"
    while time.monotonic() < deadline:
        fresh = file.exists() and file.stat().st_mtime > began
        if fresh and any(row["images"] > images for row in read_metrics(run)[-3:]):
            return
        time.sleep(0.02)


def rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(run)]


if __name__ == "__main__":
    main()
