"""Whether a card gives the right answers: golden vectors, README's snippets, the marked tests."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import ROOT, Bench, attempt
from tarflow_dist.flow.model import Flow

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
    """`pytest -m cuda`."""
    where = [] if bench.cuda else ["--on-cpu"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "cuda", *where]
    command += ["--tb=line", "-p", "no:cacheprovider", "tests/cuda"]
    if bench.tiny:
        command += ["-k", "curve and 1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = (done.stdout or done.stderr).splitlines()[-12:]
    yield {"pytest": {"exit code": done.returncode, "said": said}}
    if done.returncode:
        raise AssertionError(said[-1] if said else "pytest fails")
