"""The kernels of a GPU: by Triton's interpreter against PyTorch, and compiled for cards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch brings Triton on Linux alone")
WORKER = Path(__file__).parents[1] / "triton_worker.py"


def worker(*what: str, **environment: str) -> str:
    """In a process of its own: what a kernel is, is settled when it is imported."""
    done = subprocess.run(
        [sys.executable, WORKER, *what],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_they_compute_what_pytorch_does() -> None:
    assert worker("compute", TRITON_INTERPRET="1") == "79 cases agree\n"


def test_they_compile_for_cards() -> None:
    """For Ampere and Hopper, in each type, with the keys in one part and in several, and under each
    guidance."""
    assert worker("compile") == "156 kernels compiled\n"
