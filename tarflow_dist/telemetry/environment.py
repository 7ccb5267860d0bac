"""What a result depends on besides its settings: versions and commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("tarflow_dist", "torch", "deepspeed", "mosaicml-streaming", "numpy", "torch-fidelity")


def describe_environment() -> dict[str, str | None]:
    """Package versions and the git commit of the code (None outside a checkout)."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "commit": _commit()}


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
