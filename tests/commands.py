"""Commands run as a user runs them."""

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRESH = get_context("forkserver")  # processes that need not import streaming again
FRESH.set_forkserver_preload(["streaming", "data_prep.commands"])


def run(
    module: str, *arguments: object, ranks: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments…` and waits, one thread a rank, under torchrun for more
    than one. Fails the test if the command fails, unless `check` is off."""
    done = subprocess.run(
        command(module, *arguments, ranks=ranks),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert not check or done.returncode == 0, f"{module} failed:\n{done.stdout}\n{done.stderr}"
    return done


def processes_of(text: str) -> list[int]:
    """Those whose command line or working folder has `text` in it, by Linux's /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                said = (folder / "cmdline").read_text() + os.readlink(folder / "cwd")
            except OSError:  # it has just ended, or is another user's
                continue
            if text in said:
                found.append(int(folder.name))
    return found


def command(module: str, *arguments: object, ranks: int = 1) -> list[str]:
    """The command line of `python -m module arguments…`."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launcher, module, *map(str, arguments)]
