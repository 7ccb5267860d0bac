from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as mds/ and wds/, in a dozen shards."""
    out = tmp_path_factory.mktemp("shards")
    prepare(Digits(seed=0), out, ["mds", "wds"], Settings(size=8, shard_bytes=20_000))
    return out
