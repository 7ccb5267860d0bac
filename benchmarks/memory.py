"""Peak memory of a preparation at 96 px, over all its processes, at 5,000 images and at more.

    python -m benchmarks.memory [5000 20000 40000]

Of their own: what the processes allocated. With libraries: also the files that they have mapped,
code mostly; a page that processes share counts once in all, so others that run the same libraries
make it less. For a comparison, a process that imports streaming and does nothing.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.pictures import write_photos

# 5,000 images of 96 px are 90 MB, more than a shard of 64 MB
SIZE, WORKERS, EVERY_SECONDS = 96, 2, 0.1
KINDS = ("Pss_Anon", "Pss")  # of Linux's smaps: proportional set size


def tree(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [process, *(each for child in map(int, children) for each in tree(child))]


def proportional_set_size(process: int) -> list[int]:
    """Of each of KINDS, in KiB; nothing if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return [0] * len(KINDS)
    sizes = dict(line.split()[:2] for line in lines[1:])
    return [int(sizes.get(f"{kind}:", 0)) for kind in KINDS]


def peaks(command: list[str]) -> list[int]:
    """Of each of KINDS over all processes, in KiB."""
    most = [0] * len(KINDS)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            now = zip(*map(proportional_set_size, tree(run.pid)), strict=True)
            most = list(map(max, most, map(sum, now)))
            time.sleep(EVERY_SECONDS)
    assert run.returncode == 0
    return most


def report(images: str, form: str, command: list[str]) -> None:
    own, whole = (f"{size / 1024:.0f}" for size in peaks([sys.executable, *command]))
    print(f"| {images} | {form} | {own} | {whole} |", flush=True)


def main() -> None:
    print("| images | format | of their own, MiB | with libraries, MiB |")
    print("|---|---|---|---|")
    report("", "`import streaming`", ["-c", "import streaming; __import__('time').sleep(1)"])
    for count in map(int, sys.argv[1:] or (5_000, 20_000, 40_000)):
        with tempfile.TemporaryDirectory() as scratch:
            photos = Path(scratch, "photos")
            write_photos(photos, count, different=100)
            for form in ("mds", "wds"):
                command = ["-m", "data_prep", "folder", str(photos), f"{scratch}/{form}"]
                command += ["--size", str(SIZE), "--format", form, "--workers", str(WORKERS)]
                report(f"{count:,}", form, command)


if __name__ == "__main__":
    main()
