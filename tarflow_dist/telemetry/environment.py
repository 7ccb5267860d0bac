"""What a result depends on besides its settings: versions and commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

COMMIT_FILE = "COMMIT"  # beside a copy of the code that a job was submitted with
PACKAGES = ("tarflow_dist", "torch", "deepspeed", "mosaicml-streaming", "numpy", "torch-fidelity")


def describe_environment() -> dict[str, str | None]:
    """Package versions (None where not installed) and the git commit of the code (None outside a
    checkout)."""
    versions = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    recorded = Path(__file__).parents[2] / COMMIT_FILE
    if recorded.exists():
        return recorded.read_text().strip()
    try:
        # a copy that is installed somewhere inside another repository is not that one's
        _git("ls-files", "--error-unmatch", __file__)
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()
