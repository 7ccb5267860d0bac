"""result.json: the figures, and all that they depend on."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tarflow_dist import distributed
from tarflow_dist.evaluation.metrics import METRICS
from tarflow_dist.files import write_whole


class Stages:
    """Seconds that each stage took, said aloud when one begins that shows no progress itself."""

    def __init__(self, seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        self.seconds = dict(seconds)

    @contextmanager
    def stage(self, name: str, announce: str = "") -> Iterator[None]:
        """The body is the stage `name`, or a further part of it."""
        if announce and distributed.is_main():
            print(announce, file=sys.stderr, flush=True)
        began = time.perf_counter()
        yield
        spent = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.seconds[name] = round(spent, 3)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Collective. Memory is the largest of all ranks', in MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes here
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    cuda = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0
    peaks = distributed.gather((host, cuda))
    return {
        "device": distributed.device_name(device),
        "world_size": distributed.world_size(),
        "peak_memory_mb": round(max(host for host, _ in peaks)),
        "peak_device_memory_mb": round(max(cuda for _, cuda in peaks)),
    }


def write_result(result: dict[str, Any], file: Path) -> None:
    with write_whole(file) as part:
        part.write_text(json.dumps(result, indent=2) + "\n")


def figures(result: dict[str, Any]) -> dict[str, str]:
    """The figures of a result as people read them, with their spreads, by title."""
    shown = {}
    for metric in METRICS:
        if metric.title and result[metric.name] is not None:
            error = result.get(metric.spread)
            spread = "" if error is None else f" ± {error:.2g}"
            title = metric.title_on(result["features"])
            shown[title] = f"{result[metric.name]:.{metric.digits}g}{spread}"
    return shown


def guidance(result: dict[str, Any]) -> str:
    """How a result's samples were guided, for people."""
    if result["guidance"] == 0:
        return "none"
    annealed = " annealed" if result["annealed"] else ""
    blocks = result["guide_blocks"]
    return (
        f"{result['guidance']:g}{annealed}, {result['rule']}, guide {result['guide']} in "
        f"{'all blocks' if blocks is None else f'blocks {blocks}'}, "
        f"attn_temp {result['attn_temp']:g}"
    )


def denoising(result: dict[str, Any]) -> str:
    """How a result's samples were denoised, for people."""
    if not result["denoise"]:
        return "not denoised"
    if "denoise_steps" not in result:
        return "denoised"
    order = " of order 2" if result["denoise_order"] == 2 else ""
    clipped = ", clipped" if result["denoise_clip"] else ""
    stochastic = ", stochastic" if result["denoise_stochastic"] else ""
    return f"denoised in {result['denoise_steps']} steps{order}{clipped}{stochastic}"


def samples(result: dict[str, Any]) -> str:
    """What was measured, for people."""
    count = f"{result['num_samples']:,}"
    if "guidance" not in result:
        return f"{count} images of {result['samples']}"
    annealed = " annealed" if result["annealed"] else ""
    return f"{count} samples at guidance {result['guidance']:g}{annealed}, {denoising(result)}"


def show(result: dict[str, Any], folder: Path) -> None:
    """Prints the gist."""
    count = result["reference_images"]
    digest = f"sha256 {result['samples_sha256'][:16]}…"
    rows = figures(result) | {"features": result["features"]}
    if "guidance" in result:
        redrawn = result["redrawn_samples"]
        rows |= {
            "samples": f"{result['num_samples']:,}, labels {result['labels'] or 'none'}, "
            f"seed {result['seed']}, {digest}"
            + (f", {redrawn:,} of them drawn again" if redrawn else ""),
            "guidance": guidance(result),
            "denoising": denoising(result),
        }
    else:
        rows["samples"] = f"{samples(result)}, {digest}"
    rows |= {
        "reference": " ".join(filter(None, (result["reference"], result["reference_split"])))
        + f", {'an unsaid number of' if count is None else format(count, ',')} images",
        "seconds": ", ".join(f"{stage} {s:.1f}" for stage, s in result["seconds"].items()),
        "written to": str(folder),
    }
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    for sentence in result["warnings"]:
        print(f"note: {sentence}")
