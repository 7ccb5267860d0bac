from collections.abc import Iterator

import cluster as clusters
import pytest
from strikes import Launcher


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    """launch.py on a cluster of two nodes, which a file of tests may damage."""
    if problem := clusters.missing():
        pytest.skip(problem)
    with clusters.Cluster() as cluster:
        yield Launcher(cluster)
