"""What several rooms' tests need."""

from pathlib import Path

import pytest
from commands import run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as `python -m data_prep digits` writes them: a folder with mds/ and wds/."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    run("data_prep", "digits", out)
    return out
