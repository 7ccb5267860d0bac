"""All that a card must prove, in one command of eight minutes, the most telling first.

    python -m benchmarks.gpu --out DIR [--published ML-TARFLOW] [--only SECTION,…] [--budget 480]
    python -m benchmarks.gpu --out DIR --device cpu --tiny     # all of it in small, to know it runs

Each section is a process of its own with a limit; what it found, or why it failed, is a line of
DIR/results.jsonl at once, with the card's name. `python -m benchmarks.gpu.page DIR` draws the GPU
section of benchmarks/README.md from it. `prepare.sh` gathers what a machine without network lacks.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu import correctness, models, pipeline, sampling, training
from benchmarks.gpu.models import Bench

Section = Callable[[Bench], Iterator[dict[str, Any]]]
# in their order, with the seconds that each may take
SECTIONS: dict[str, tuple[Section, float]] = {
    "golden": (correctness.golden, 45),
    "readme": (correctness.readme, 30),
    "sampling": (sampling.against_the_published, 130),
    "steps": (training.steps, 110),
    "cuda-tests": (correctness.cuda_tests, 100),
    "overlap": (training.overlap, 60),
    "memory": (training.memory, 60),
    "profiles": (training.profiles, 50),
    "command": (pipeline.commands, 80),
    "loader": (pipeline.loader, 50),
    "inception": (pipeline.inception, 30),
    "checkpoint": (training.checkpoint_stall, 40),
}
SHORTEST = 15.0  # seconds that are worth a start
TO_END = 6.0  # that a section has left when it is told that its time is over


class TimeIsOverError(BaseException):
    """No `except Exception` may hold it up."""


def main() -> int:
    args = parse_arguments()
    if args.section:
        run_section(args.section, bench_of(args), args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), 0
    for name in args.only or SECTIONS:
        limit = SECTIONS[name][1] * (4 if args.device == "cpu" else 1)
        limit = min(limit, began + args.budget - time.monotonic())
        line = {"section": name, "device": models.device_name(args.device), "tiny": args.tiny}
        line |= {"day": datetime.date.today().isoformat(), "seconds": 0.0}
        if limit < SHORTEST:
            line |= {"ok": False, "error": "no time was left"}
        else:
            line |= run_apart(name, limit)
        failed += not line["ok"]
        with (args.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(json.dumps(line, default=str), flush=True)
    return min(failed, 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--published", type=Path, help="checkout of apple/ml-tarflow")
    add("--only", type=lambda text: text.split(","), help="sections with commas between")
    add("--budget", type=float, default=480, help="seconds for all; default 480")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="models and numbers that a laptop can do")
    add("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    add("--limit", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.only or ()) - set(SECTIONS)):
        parser.error(f"no section {unknown[0]}: there are {', '.join(SECTIONS)}")
    return args


def bench_of(args: argparse.Namespace) -> Bench:
    return Bench(args.device, args.tiny, args.published and args.published.resolve())


def run_apart(name: str, limit: float) -> dict[str, Any]:
    """The section in a process of its own: what it found last before it ended or was ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
    command += ["--section", name, "--limit", str(limit)]
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill_all(process)
        said, errors = process.communicate()
    kill_all(process)  # what it started must not hold the card while the next one is measured
    lines = [line for line in said.splitlines() if line.startswith('{"ok"')]
    found = json.loads(lines[-1]) if lines else {"ok": False, "error": errors[-800:]}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def kill_all(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_section(name: str, bench: Bench, limit: float) -> None:
    """Prints what is found each time that there is more of it, and ends the process."""
    found: dict[str, Any] = {}

    def over(*_: object) -> None:
        raise TimeIsOverError(f"its {limit:.0f} seconds were over")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(max(1, int(limit - TO_END)))
    ending: dict[str, Any] = {"ok": True}
    try:
        models.see_only(bench.device)
        for more in SECTIONS[name][0](bench):
            found |= more
            print(json.dumps({"ok": False, "found": found}, default=str), flush=True)
        if failures := models.problems(found):
            ending = {"ok": False, "error": failures[0]}
    except BaseException as error:
        at = traceback.format_exc().splitlines()[-5:]
        ending = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]}", "at": at}
    print(json.dumps({**ending, "found": found}, default=str), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
