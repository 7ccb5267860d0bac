"""What several rooms' tests need: shards of digits, and commands run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as `python -m data_prep digits` writes them: a folder with mds/ and wds/."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    command = [sys.executable, "-m", "data_prep", "digits", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `python -m module arguments…`, under torchrun for more than one rank, one thread each.

    The rank count is given as `ranks`; `check=False` returns a failed command too.
    """

    def run(
        module: str, *arguments: object, ranks: int = 1, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m"]
        done = subprocess.run(
            [*launcher, module, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if check and done.returncode:
            raise AssertionError(f"{module} failed:\n{done.stdout}\n{done.stderr}")
        return done

    return run
