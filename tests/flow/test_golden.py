"""The flow against vectors that the published model computed (tests/golden/README.md)."""

import pytest
import torch
from golden_model import CASES, golden_flow, golden_vectors, settings

from tarflow_dist.flow.jacobi import Solver

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[dtype])


FORWARDS = [
    ("cond", "forward", "y"),
    ("cond", "forward_drop", "y_drop"),
    ("uncond", "forward", "no labels"),
    ("volume_preserving", "forward", "y"),
    ("volume_preserving", "forward_drop", "y_drop"),
]


@pytest.mark.parametrize(("case", "prefix", "labels"), FORWARDS)
def test_forward(case: str, prefix: str, labels: str, dtype: torch.dtype) -> None:
    flow, v = golden_flow(case, dtype), golden_vectors(case)
    per_block = []
    for block in flow.blocks:
        block.register_forward_hook(lambda module, args, output: per_block.append(output[0]))
    z, logdets = flow(v["x"].to(dtype), v.get(labels))
    assert_close(z, v[f"{prefix}.z"], dtype)
    assert_close(logdets.sum(0) / flow.num_dims, v[f"{prefix}.logdet_per_dim"], dtype)
    if f"{prefix}.loss" in v:
        assert_close(flow.loss(z, logdets).reshape(1), v[f"{prefix}.loss"], dtype)
    for t, output in enumerate(per_block):
        if f"{prefix}.block{t}" in v:
            assert_close(output, v[f"{prefix}.block{t}"], dtype)


def test_reverse(case: str, dtype: torch.dtype) -> None:
    flow, v = golden_flow(case, dtype), golden_vectors(case)
    for label, arguments in settings(case)["reverse"].items():
        x = flow.decode(v["noise"].to(dtype), v.get("y"), **arguments)
        assert_close(x, v[f"reverse.{label}"], dtype)


@pytest.mark.parametrize(
    "solver",
    [
        Solver(window=3),
        Solver(window=1000),
        Solver(window=4, tolerance=1e-11),
        Solver(window=1000, tolerance=1e-11),
    ],
    ids=str,
)
def test_reverse_in_windows(case: str, solver: Solver) -> None:
    flow, v = golden_flow(case, torch.float64), golden_vectors(case)
    for label, arguments in settings(case)["reverse"].items():
        solvers = [solver, Solver()] * len(flow.blocks)
        x = flow.decode(v["noise"], v.get("y"), **arguments, solvers=solvers[: len(flow.blocks)])
        torch.testing.assert_close(x, v[f"reverse.{label}"], rtol=0, atol=1e-9)


def test_denoise(case: str, dtype: torch.dtype) -> None:
    flow, v = golden_flow(case, dtype), golden_vectors(case)
    assert_close(flow.denoise(v["x"].to(dtype), v.get("y")), v["denoise"], dtype)


def test_training_losses(case: str, dtype: torch.dtype) -> None:
    flow, v = golden_flow(case, dtype), golden_vectors(case)
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    losses = []
    for _ in range(6):
        loss = flow.loss(*flow(v["x"].to(dtype), v.get("y")))
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(torch.stack(losses), v["train.losses"], dtype)
