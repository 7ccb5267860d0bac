"""result.json: the figures, and all that they depend on."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tarflow_dist import distributed
from tarflow_dist.evaluation.sampling import Drawn
from tarflow_dist.files import write_whole


class Stages:
    """Seconds that each stage took, said aloud when one begins that shows no progress itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, announce: str = "") -> Iterator[None]:
        """The body is the stage `name`, or a further part of it."""
        if announce and distributed.is_main():
            print(announce, file=sys.stderr, flush=True)
        began = time.perf_counter()
        yield
        spent = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.seconds[name] = round(spent, 3)


def describe_drawing(drawn: Drawn, chunks: int) -> dict[str, Any]:
    """What this sitting drew, `chunks` of it for the store in question. "sampling_overhead" is the
    share of the ranks' time in it that the model did not have: waiting for the last chunk to be
    written, and for the slowest rank."""
    overhead = 1 - drawn.model_seconds / drawn.seconds if any(drawn.chunks) else None
    return {
        "chunks_drawn": chunks,
        "sampling_overhead": None if overhead is None else round(overhead, 4),
    }


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


def plus_minus(result: dict[str, Any], name: str, spread: str, digits: int = 4) -> str:
    """The figure `name` with its `spread`, for people; "—" where it was not measured."""
    if result[name] is None:
        return "—"
    error = result.get(spread)
    return f"{result[name]:.{digits}g}" + ("" if error is None else f" ± {error:.2g}")


def figures(result: dict[str, Any]) -> dict[str, str]:
    """The figures of a result as people read them, by name."""
    inception = result["features"].startswith("inception")
    rows = {
        "FID" if inception else "Fréchet distance": plus_minus(
            result, "frechet_distance", "frechet_distance_error", 5
        ),
        "sFID": plus_minus(result, "spatial_frechet_distance", ""),
        "Inception Score": plus_minus(result, "inception_score", "inception_score_std"),
        "precision": plus_minus(result, "precision", ""),
        "recall": plus_minus(result, "recall", ""),
        "KID" if inception else "kernel distance": plus_minus(
            result, "kernel_distance", "kernel_distance_std"
        ),
    }
    return {name: value for name, value in rows.items() if value != "—"}


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


def show(result: dict[str, Any], folder: Path) -> None:
    """Prints the gist."""
    count, redrawn = result["reference_images"], result["redrawn_samples"]
    rows = figures(result) | {
        "features": result["features"],
        "samples": f"{result['num_samples']:,}, labels {result['labels'] or 'none'}, "
        f"seed {result['seed']}, sha256 {result['samples_sha256'][:16]}…"
        + (f", {redrawn:,} of them drawn again" if redrawn else ""),
        "guidance": guidance(result),
        "denoising": denoising(result),
        "reference": " ".join(filter(None, (result["reference"], result["reference_split"])))
        + f", {'an unsaid number of' if count is None else format(count, ',')} images",
        "seconds": ", ".join(f"{stage} {s:.1f}" for stage, s in result["seconds"].items()),
        "written to": str(folder),
    }
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    for sentence in result["warnings"]:
        print(f"note: {sentence}")
