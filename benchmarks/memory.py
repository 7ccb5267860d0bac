"""Peak memory of a preparation, over all its processes, at 5,000 and at 20,000 images.

    python -m benchmarks.memory [5000 20000]

A page that processes share counts once (Linux's proportional set size).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.pictures import write_photos

WORKERS, EVERY_SECONDS = 2, 0.1


def tree(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [process, *(each for child in map(int, children) for each in tree(child))]


def proportional_set_size(process: int) -> int:
    """In bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def peak(command: list[str]) -> int:
    """Bytes of all processes."""
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            most = max(most, sum(map(proportional_set_size, tree(run.pid))))
            time.sleep(EVERY_SECONDS)
    assert run.returncode == 0
    return most


def main() -> None:
    print("| images | format | MiB |")
    print("|---|---|---|")
    for count in map(int, sys.argv[1:] or (5_000, 20_000)):
        with tempfile.TemporaryDirectory() as scratch:
            photos = Path(scratch, "photos")
            write_photos(photos, count, different=100)
            for form in ("mds", "wds"):
                command = [sys.executable, "-m", "data_prep", "folder", str(photos)]
                command += [f"{scratch}/{form}", "--size", "64", "--format", form]
                most = peak([*command, "--workers", str(WORKERS)])
                print(f"| {count:,} | {form} | {most >> 20} |", flush=True)


if __name__ == "__main__":
    main()
