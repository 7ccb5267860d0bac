"""Damages every kind of file that the product reads, and looks at what its commands make of it.

    python -m benchmarks.fuzz [--cases 10000] [--seed 0] [--seconds 7200] [--only NAME,…]

Each case copies a part of a small world, damages one file and runs one command on it. It must end
as with the sound file, or with one sentence and exit code 2 (of `verify` 1): never with a
traceback, a crash, a hang, a checkpoint lost, a file written outside, or another result. Prints a
table, and each case that ended otherwise, which --case makes again from the same seed and number.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.fuzz.damage import KINDS
from benchmarks.fuzz.targets import TARGETS, Target
from benchmarks.fuzz.world import build
from tarflow_dist.errors import run_command

LIMIT_SECONDS = 30  # a case that takes longer hangs
LIMIT_BYTES = 16 * 2**30  # of addresses: a case that wants more eats memory
TEMPORARY = Path("/tmp")


class Ending(NamedTuple):
    code: int
    """Negative: killed by that signal."""
    said: str
    result: Any


class Case(NamedTuple):
    number: int
    target: str
    kind: str
    file: str
    outcome: str
    detail: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=7200, help="no case begins after that")
    parser.add_argument("--only", help="names of targets, with commas between")
    parser.add_argument("--case", type=int, help="this case alone, and all that it says")
    args = parser.parse_args()
    targets = [t for t in TARGETS if not args.only or t.name in args.only.split(",")]
    numbers = range(args.cases) if args.case is None else range(args.case, args.case + 1)
    torch.set_num_threads(1)
    for target in targets:  # so that a case, which is forked, need not
        importlib.import_module(target.command[0])
    for module in ("torch.testing", "deepspeed", "streaming", "tarflow_dist.training.loop"):
        importlib.import_module(module)
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch, "world")
        world.mkdir()
        build(world)
        sound = {target.name: run_sound(target, world, Path(scratch)) for target in targets}
        jobs = [(args.seed, n, targets[n % len(targets)], sound, world, deadline) for n in numbers]
        context = multiprocessing.get_context("fork")
        cases = []
        # its processes may have children, which multiprocessing.Pool's may not
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            for case in filter(None, pool.map(run_case, jobs)):
                cases.append(case)
                if case.outcome not in GOOD or args.case is not None:
                    print(*case[:5], case.detail, sep=" | ", flush=True)
    show(cases)
    sys.exit(any(case.outcome not in GOOD for case in cases))


def run_sound(target: Target, world: Path, scratch: Path) -> Any:
    ending = run_in_copy(target, world, Path(tempfile.mkdtemp(dir=scratch)), lambda _: None)
    if ending.code:
        sys.exit(f"{target.name}, sound: {ending.code}, {ending.said}")
    return ending.result


def run_case(job: tuple[int, int, Target, dict[str, Any], Path, float]) -> Case | None:
    seed, number, target, sound, world, deadline = job
    if time.monotonic() > deadline:
        return None
    draw = random.Random(f"{seed} {number}")
    files = sorted({f for p in target.files for f in world.glob(p) if f.is_file()})
    file = draw.choice([f for f in files if f.stat().st_size])
    kind = draw.choice(KINDS)
    name = file.relative_to(world).as_posix()
    lost: list[str] = []

    def damage(copy: Path) -> None:
        kind(copy / name, draw)

    with tempfile.TemporaryDirectory() as folder:
        before = set(TEMPORARY.glob("climbed*"))
        ending = run_in_copy(target, world, Path(folder), damage)
        copy = Path(folder, *DEPTH)
        for kept in (f for p in target.keeps for f in world.glob(p)):
            there = copy / kept.relative_to(world)
            given_up = there.parent.with_name(f"{there.parent.name}.given-up") / there.name
            if not (there.exists() or given_up.exists()) and there != copy / name:
                lost.append(there.name)
        outside = [f.name for f in Path(folder).rglob("climbed*") if copy not in f.parents]
        outside += [str(f) for f in set(TEMPORARY.glob("climbed*")) - before]
    outcome = judge(target, ending, sound[target.name], lost, outside)
    return Case(number, target.name, kind.__name__, name, outcome, ending.said[-1500:])


LOST_ROWS = "were changed or lost since they were written"  # of metrics, which nothing brings back
GOOD = ("the same result", "a sentence", "named, and gone on with")


def judge(target: Target, ending: Ending, sound: Any, lost: list[str], outside: list[str]) -> str:
    errors = [line for line in ending.said.splitlines() if line.startswith("error")]
    if "Traceback (most recent call last)" in ending.said:
        return "a traceback"
    if ending.code == -signal.SIGALRM:
        return "a hang"
    if outside:
        return f"files outside: {outside}"
    if lost:
        return f"checkpoints lost: {lost}"
    if ending.code == 0:
        if ending.result == sound:
            return "the same result"
        return "named, and gone on with" if LOST_ROWS in ending.said else "another result"
    if ending.code in target.codes and (len(errors) == 1 or ending.code == 1):
        return "a sentence"
    return f"exit code {ending.code} with {len(errors)} errors"


DEPTH = ("a", "b", "c", "d")  # where climbing leads out, but not out of the case's own folder


def run_in_copy(
    target: Target, world: Path, folder: Path, damage: Callable[[Path], None]
) -> Ending:
    copy = folder.joinpath(*DEPTH)
    copy.mkdir(parents=True)
    for name in target.folders:
        whole = world / name
        if whole.is_dir():
            shutil.copytree(whole, copy / name)
        else:
            shutil.copy(whole, copy / name)
    damage(copy)
    said = folder / "said"
    child = os.fork()
    if child == 0:
        _run(target, copy, said)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    text = said.read_text(errors="replace")
    try:
        result = target.result(copy) if code == 0 else None
    except (OSError, ValueError, KeyError) as error:
        result = f"none: {error}"
    return Ending(code, text, result)


def _run(target: Target, copy: Path, said: Path) -> None:
    """In a process of its own, which it ends."""
    os.setpgid(0, 0)
    with said.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(copy)
    signal.alarm(LIMIT_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    module, *argv = target.command
    if module == "data_prep":
        module = "data_prep.__main__"
    sys.argv = [module, *argv]
    code = 1
    try:
        run_command(importlib.import_module(module).main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def show(cases: list[Case]) -> None:
    """A line a target, a column an outcome."""
    print(f"| {len(cases)} cases | cases | {' | '.join(GOOD)} | anything else |")
    print("|---|---|" + "---|" * (len(GOOD) + 1))
    for name in dict.fromkeys(case.target for case in sorted(cases)):
        found = Counter(case.outcome for case in cases if case.target == name)
        good = [found[outcome] for outcome in GOOD]
        columns = [found.total(), *good, found.total() - sum(good)]
        print(f"| {name} | {' | '.join(map(str, columns))} |")


if __name__ == "__main__":
    main()
