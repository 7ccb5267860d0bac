"""Tests of a card: `pytest -m cuda`; `--on-cpu` runs them on the CPU, to know that they run."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-cpu", action="store_true", help="run the tests marked cuda on the CPU")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.config.getoption("--on-cpu", default=False):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here, or it is hidden: pytest -m cuda")
    return torch.device("cuda")
