"""Samples on 1, 2 and 4 ranks, with and without kills −9: the same bits?

    python benchmarks/sample_kills.py --model MODEL --reference SHARDS [--kills 15]

Draws the same samples on each number of ranks without a disturbance, and once more on ever changing
numbers of ranks with a kill −9 at a random moment of each sitting, now of one rank and now of all
processes at once. Prints a table of the samples' SHA-256 and fails if they differ.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--num-samples", type=int, default=10_000)
    args = parser.parse_args()
    found = set()
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 4):
            out = Path(folder, f"{ranks}-ranks")
            finish(args, out, ranks)
            found.add(digest(out))
            print(f"{ranks} ranks, undisturbed            {digest(out)}", flush=True)
        out = Path(folder, "killed")
        for kill in range(args.kills):
            kill_once(args, out, kill)
        finish(args, out, ranks=2)
        found.add(digest(out))
        print(f"1, 2 and 4 ranks, {args.kills} kills -9    {digest(out)}")
    sys.exit(len(found) != 1)


def kill_once(args: argparse.Namespace, out: Path, kill: int) -> None:
    """A sitting that is killed when it has drawn for up to 0.7 s."""
    ranks = (1, 2, 4)[kill % 3]
    process = start(args, out, ranks)
    before = drawn(out)
    while process.poll() is None and drawn(out) == before:
        time.sleep(0.01)
    time.sleep(random.Random(kill).uniform(0, 0.7))
    launcher = psutil.Process(process.pid)
    ranks_alive = launcher.children(recursive=True)
    for each in ranks_alive[-1:] or [launcher] if kill % 2 else [launcher, *ranks_alive]:
        each.kill()
    code = process.wait()
    psutil.wait_procs(ranks_alive)
    what = "one rank" if kill % 2 else "all at once"
    print(f"kill {kill + 1}: {what} of {ranks}, exit {code}, {drawn(out)} chunks there", flush=True)


def finish(args: argparse.Namespace, out: Path, ranks: int) -> None:
    if code := start(args, out, ranks).wait():
        sys.exit(f"drawing on {ranks} ranks ended with exit code {code}")


def start(args: argparse.Namespace, out: Path, ranks: int) -> subprocess.Popen:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    samples = ["--num-samples", str(args.num_samples), "--batch-size", "25", "--guidance", "0.5"]
    compared = ["--reference", str(args.reference), "--features", "pixels"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", *(launcher if ranks > 1 else [])),
            *("tarflow_dist.sample_fid", "--model", str(args.model), "--out", str(out)),
            *samples,
            *compared,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def drawn(out: Path) -> int:
    return len(list(out.glob("samples-*.parquet")))


def digest(out: Path) -> str:
    return json.loads((out / "result.json").read_text())["samples_sha256"]


if __name__ == "__main__":
    main()
