"""Whether a card gives the right answers: golden vectors, recorded as one by one, the same twice,
README's snippets, the marked tests."""

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.models import ROOT, Bench, Problem, attempt
from tarflow_dist.config import Config
from tarflow_dist.flow import inverse, native
from tarflow_dist.flow.cuda_graphs import GraphedInverse
from tarflow_dist.flow.jacobi import Solver
from tarflow_dist.flow.model import Flow

WAYS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "guided": {"guidance": 1.5, "annealed": True},
    "gaussian": {"guidance": 2.0, "rule": "gaussian"},
    "temperature": {"guidance": 1.0, "attn_temp": 0.7},
    "windows": {"guidance": 1.5, "solvers": [Solver(8, 1e-3)] * 2},
}
BOUNDS = {torch.float64: 1e-10, torch.float32: 5e-6}


def golden(bench: Bench) -> Iterator[dict[str, Any]]:
    """Largest errors against the published models' float64 vectors."""
    sys.path.append(str(ROOT / "tests"))
    import golden_model

    for case in golden_model.CASES:
        vectors = {k: v.to(bench.device) for k, v in golden_model.golden_vectors(case).items()}
        for dtype, bound in BOUNDS.items():
            flow = golden_model.golden_flow(case, dtype).to(bench.device)
            reverses = golden_model.settings(case)["reverse"]
            found = attempt(partial(largest_errors, flow, vectors, reverses))
            if isinstance(found, dict):
                found |= {"bound": bound, "within": all(error <= bound for error in found.values())}
            yield {f"{case} {dtype}".replace("torch.", ""): found}


def largest_errors(
    flow: Flow, vectors: dict[str, Tensor], reverses: dict[str, dict[str, Any]]
) -> dict[str, float]:
    x, y = vectors["x"].to(flow.dtype), vectors.get("y")
    z, logdets = flow(x, y)
    found = {
        "forward.z": z,
        "forward.logdet_per_dim": logdets.sum(0) / flow.num_dims,
        "denoise": flow.denoise(x, y),
    }
    found |= {
        f"reverse.{label}": flow.decode(vectors["noise"], y, **arguments)
        for label, arguments in reverses.items()
    }
    return {key: float((value - vectors[key]).abs().max()) for key, value in found.items()}


def graphs(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decoding as it is recorded: whether it has the bits of the same operations one by one, and
    how far it is from patch after patch by PyTorch's own kernels."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        flow = bench.flow("in64", blocks=2, dtype=dtype, patch_size=8)
        for way, arguments in WAYS.items():
            found = attempt(partial(recorded_and_not, bench, flow, arguments))
            yield {f"{way}, {dtype}".replace("torch.", ""): found}


def recorded_and_not(bench: Bench, flow: Flow, arguments: dict[str, Any]) -> dict[str, Any]:
    z, y = latents(flow, 5)

    def decode(*, graphs: bool, recorded: bool) -> Tensor:
        with (
            mock.patch.object(inverse, "has_graphs", return_value=graphs),
            mock.patch.object(native, "can_run", return_value=False),
            mock.patch.object(flow, "graphed", GraphedInverse()),
            nullcontext() if bench.cuda else kernels_of_pytorch(),
            nullcontext()
            if recorded and bench.cuda
            else mock.patch("tarflow_dist.flow.cuda_graphs.record", lambda work, changes: work),
        ):
            return flow.decode(z, y, **arguments)

    recorded = decode(graphs=True, recorded=True)
    plain = decode(graphs=False, recorded=False)
    return {
        "equal": torch.equal(recorded, decode(graphs=True, recorded=False)),
        "to plain": float((recorded - plain).abs().max()),
    }


def kernels_of_pytorch() -> AbstractContextManager:
    """Instead of Triton's, which a CPU can only interpret, at a thousandth of the speed."""
    sys.path.append(str(ROOT / "tests"))
    import plain_kernels

    return mock.patch.multiple("tarflow_dist.flow.triton_kernels", **plain_kernels.KERNELS)


def latents(flow: Flow, batch: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(batch, device=flow.device)
    return flow.noise_of(index, seed=1), index * 7 % flow.num_classes


def twice(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same bits again: decoding, and the weights after three steps of train.deterministic; how
    far they are apart without, and what it costs."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as `train` has it
    flow = bench.flow("in64", blocks=1, patch_size=4)
    z, y = latents(flow, 2 if bench.tiny else 64)
    decode = partial(flow.decode, z, y, guidance=1.5)
    yield {"decoding": attempt(lambda: {"equal": torch.equal(decode(), decode())})}
    for name in ("plain", "deterministic"):
        config = bench.config("in64", f"train.deterministic={str(name != 'plain').lower()}")
        found = attempt(partial(trained_twice, bench, config))
        if name == "plain" and isinstance(found, dict):
            del found["equal"]  # nobody promised it
        yield {f"three steps, {name}": found}


def trained_twice(bench: Bench, config: Config) -> dict[str, Any]:
    from benchmarks.gpu.training import started

    weights, took = [], 0.0
    for _ in range(2):
        bench.free()
        run = started(bench, config)
        run.step()
        took = sum(bench.seconds(run.step) for _ in range(2)) / 2
        weights.append([parameter.detach().clone() for parameter in run.engine.flow.parameters()])
    pairs = list(zip(*weights, strict=True))
    return {
        "equal": all(torch.equal(one, other) for one, other in pairs),
        "largest difference": max(float((one - other).abs().max()) for one, other in pairs),
        "milliseconds": round(1e3 * took, 1),
    }


def readme(bench: Bench) -> Iterator[dict[str, Any]]:
    """README's Python snippets, with a model of random weights on the device."""
    text = (ROOT / "README.md").read_text()
    flow = bench.flow("in64", blocks=1, dtype=torch.float32)
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        lines = [line for line in snippet.splitlines() if "from_pretrained(" not in line]

        def run(code: str = "\n".join(lines)) -> dict[str, bool]:
            exec(code, {"flow": flow, "torch": torch})
            return {"runs": True}

        yield {f"snippet {number}": attempt(run)}


def cuda_tests(bench: Bench) -> Iterator[dict[str, Any]]:
    """`pytest -m cuda`, each test as it ends."""
    where = [] if bench.cuda else ["--on-cpu"]
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-m", "cuda", *where]
    command += ["--tb=line", "-p", "no:cacheprovider", "tests/cuda"]
    if bench.tiny:
        command += ["-k", "device or curve and 1 and not compile"]
    pytest = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert pytest.stdout is not None
    said: deque[str] = deque(maxlen=12)
    try:
        for line in pytest.stdout:
            said.append(line.rstrip())
            if ended := re.match(r".*::(.+?) (PASSED|SKIPPED|FAILED|ERROR)", line):
                test, how = ended.groups()
                yield {test: how if how in ("PASSED", "SKIPPED") else Problem(how)}
        code = pytest.wait()
    finally:
        pytest.kill()  # when its time is over
    if code:
        raise AssertionError(" / ".join(said))
