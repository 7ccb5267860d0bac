"""The third stage of `sample_fid`, and what it gives: result.json, the figures and all that they
depend on; and how people read it."""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tarflow_dist import distributed
from tarflow_dist.evaluation import metrics
from tarflow_dist.evaluation.feature_set import FeatureSet
from tarflow_dist.evaluation.metrics import METRICS
from tarflow_dist.evaluation.reference_set import Reference
from tarflow_dist.evaluation.sweep import Point, stage
from tarflow_dist.files import write_whole
from tarflow_dist.telemetry.environment import describe_environment

ABOUT = ("features", "features_sha256", "samples_sha256")  # of a feature set, said in a result
UNEVEN = 2  # how many times the images of the smallest class the largest may have, unsaid


def compare_points(
    points: list[Point], file: str, reference: FeatureSet | None, device: torch.device
) -> list[dict[str, Any]]:
    """What the features of each point, which its folder has as `file`, say of the `reference`'s,
    rank 0's. Collective."""
    real = distributed.from_main(reference)
    assert real is not None
    found = []
    for point in points:
        dim = len(real.pooled.mean)
        with stage(point.seconds, "metrics", f"comparing {dim} features {point.name}".rstrip()):
            samples = FeatureSet.load(point.folder / file)  # one point's at a time
            about = {name: samples.about[name] for name in ABOUT}
            found.append({**metrics.compare(samples, real, device), **about})
    return found


def results_of(
    points: list[Point],
    found: list[list[dict[str, Any]]],
    reference: Reference,
    facts: dict[str, Any],
    device: torch.device,
) -> list[dict[str, Any]]:
    """The result of each point. Collective.

    Args:
        found: by `compare_points`, on each kind of features; those after the first stand under
            "more_features".
        facts: further ones, of all points.
    """
    common = {**facts, **reference.about, **describe_machine(device)}
    environment = describe_environment()
    results = []
    for point, first, *more in zip(points, *found, strict=True):
        first["warnings"] += another_mix(point.facts.get("labels"), reference.class_counts)
        result = {**first, **common, **point.facts, "seconds": point.seconds}
        if more:
            result["more_features"] = more
        results.append({**result, "environment": environment})
    return results


def best_of(results: list[dict[str, Any]]) -> int:
    """The place of the one with the least distance."""
    return min(range(len(results)), key=lambda place: results[place]["frechet_distance"])


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


def described(result: dict[str, Any]) -> dict[str, str]:
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


def show(result: dict[str, Any], folder: Path) -> None:
    """Prints the gist."""
    seconds = ", ".join(f"{stage} {s:.1f}" for stage, s in result["seconds"].items())
    rows = described(result) | {"seconds": seconds, "written to": str(folder)}
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    for sentence in result["warnings"]:
        print(f"note: {sentence}")
