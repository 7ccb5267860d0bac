"""What `sample_fid` finds: a result, the figures and all that they depend on, and how people read
it."""

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tarflow_dist import distributed
from tarflow_dist.evaluation.image_sets import Samples
from tarflow_dist.evaluation.metrics import METRICS
from tarflow_dist.evaluation.reference_set import Reference
from tarflow_dist.telemetry.environment import describe_environment

UNEVEN = 2  # how many times the images of the smallest class the largest may have, unsaid

Result = dict[str, Any]
"""As result.json has it."""


def results_of(
    drawn: Mapping[str, Samples],
    compared: dict[str, list[dict[str, Any]]],
    reference: Reference,
    facts: dict[str, Any],
    seconds: dict[str, float],
    device: torch.device,
) -> dict[str, Result]:
    """The result of each point, by its name. Collective.

    Args:
        compared: by `compare`, on each kind of features; those after the first stand under
            "more_features".
        facts: further ones, of all points.
        seconds: that the stages took which all points share.
    """
    common = {**facts, **reference.about, **describe_machine(device)}
    environment = describe_environment()
    results = {}
    for name, samples in drawn.items():
        first, *more = compared[name]
        first["warnings"] += another_mix(samples.about.get("labels"), reference.class_counts)
        result = {**first, **common, **samples.about}
        result["seconds"] = samples.about["seconds"] | seconds
        if more:
            result["more_features"] = more
        results[name] = {**result, "environment": environment}
    return results


def best_of(results: dict[str, Result]) -> str:
    """The point with the least distance."""
    return min(results, key=lambda name: results[name]["frechet_distance"])


def another_mix(labels: str | None, class_counts: Sequence[int] | None) -> list[str]:
    """A sentence where samples of evenly drawn `labels` are compared with uneven classes."""
    if labels not in ("random", "balanced") or not class_counts:
        return []
    least, most = min(class_counts), max(class_counts)
    if most <= UNEVEN * least:
        return []
    return [
        f"labels are drawn evenly, and the reference's classes have {least:,} to {most:,} images: "
        "--labels reference draws its mix"
    ]


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


def figures(result: Result) -> dict[str, str]:
    """The figures of a result as people read them, with their spreads, by title."""
    shown = {}
    for metric in METRICS:
        if metric.title and result[metric.name] is not None:
            error = result.get(metric.spread)
            spread = "" if error is None else f" ± {error:.2g}"
            title = metric.title_on(result["features"])
            shown[title] = f"{result[metric.name]:.{metric.digits}g}{spread}"
    return shown


def guidance(result: Result) -> str:
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


def denoising(result: Result) -> str:
    """How a result's samples were denoised, for people."""
    if not result["denoise"]:
        return "not denoised"
    if "denoise_steps" not in result:
        return "denoised"
    order = " of order 2" if result["denoise_order"] == 2 else ""
    clipped = ", clipped" if result["denoise_clip"] else ""
    stochastic = ", stochastic" if result["denoise_stochastic"] else ""
    return f"denoised in {result['denoise_steps']} steps{order}{clipped}{stochastic}"


def samples(result: Result) -> str:
    """What was measured, for people."""
    count = f"{result['num_samples']:,}"
    if "guidance" not in result:
        return f"{count} images of {result['samples']}"
    annealed = " annealed" if result["annealed"] else ""
    return f"{count} samples at guidance {result['guidance']:g}{annealed}, {denoising(result)}"


def described(result: Result) -> dict[str, str]:
    """The figures by their titles, and what was measured, for people."""
    count = result["reference_images"]
    digest = f"sha256 {result['samples_sha256'][:16]}…"
    rows = figures(result) | {"features": result["features"]}
    for more in result.get("more_features", ()):
        rows |= {f"{title} ({more['features']})": value for title, value in figures(more).items()}
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
    rows["reference"] = (
        " ".join(filter(None, (result["reference"], result["reference_split"])))
        + f", {'an unsaid number of' if count is None else format(count, ',')} images"
    )
    return rows


def show(result: Result, folder: Path) -> None:
    """Prints the gist."""
    seconds = ", ".join(f"{stage} {s:.1f}" for stage, s in result["seconds"].items())
    rows = described(result) | {"seconds": seconds, "written to": str(folder)}
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    for sentence in result["warnings"]:
        print(f"note: {sentence}")
