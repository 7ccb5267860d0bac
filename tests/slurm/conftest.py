from collections.abc import Iterator

import cluster as clusters
import pytest
from strikes import Launcher


@pytest.fixture(scope="session")
def launch() -> Iterator[Launcher]:
    """launch.py on a cluster of two nodes."""
    if problem := clusters.missing():
        pytest.skip(problem)
    with clusters.Cluster() as cluster:
        yield Launcher(cluster)
