"""What samples depend on: the settings that a sample store is kept by."""

import argparse
import hashlib
import json
from itertools import product
from pathlib import Path
from typing import Any

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.reference_set import sha256
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.options import denoising_of, guidance_of
from tarflow_dist.policy import dtype_name
from tarflow_dist.pretrained import TarFlow

UINT8_RULES = {  # flow/noise.py, to_pixels
    "gaussian": "round((x + 1) * 127.5), clipped",
    "uniform": "floor((x + 1) * 128), clipped",
}


def sweep_settings(
    args: argparse.Namespace, flow: TarFlow, weights_sha256: str
) -> dict[str, dict[str, Any]]:
    """The settings of each point of the sweep over --guidance, --denoise and --denoise-steps, as
    JSON values, under the name of the point: "" for a single one.

    Raises:
        UserError: guidance, denoising or labels that this model can't have.
    """
    ways = denoising_ways(args, flow)
    common = {
        "weights_sha256": weights_sha256,
        "config_sha256": hashlib.sha256(json.dumps(flow.config.to_json()).encode()).hexdigest(),
        "dtype": dtype_name(next(flow.parameters()).dtype),
        "num_samples": args.num_samples,
        "chunk_size": args.batch_size,
        "seed": args.seed,
        "labels": label_rule(args, flow),
        "uint8_rule": UINT8_RULES[flow.noise],
    }
    points = {}
    for weight, (way, denoising) in product(args.guidance, ways.items()):
        # the options are for a sweep's guided points
        unguided = weight == 0 and len(args.guidance) > 1
        guidance = Guidance() if unguided else guidance_of(args, weight, flow)
        points[f"guidance-{weight:g}-{way}"] = {
            **common,
            "sampler": flow.sampler(args.batch_size, guidance),
            **guidance.arguments(),
            **denoising,
        }
    return points if len(points) > 1 else {"": next(iter(points.values()))}


def denoising_ways(args: argparse.Namespace, flow: TarFlow) -> dict[str, dict[str, Any]]:
    """The settings of each way of denoising in the sweep, by its part of the points' names."""
    wanted = args.denoise or [flow.noise == "gaussian"]
    if flow.noise == "uniform" and any(wanted):
        raise UserError(
            f"{args.model} was trained with uniform noise, which leaves nothing to denoise: leave "
            "--denoise out"
        )
    counts = args.denoise_steps or [None]
    asked = [denoising_of(args, steps, flow, wanted=any(wanted)) for steps in counts]
    ways: dict[str, dict[str, Any]] = {}
    for denoise in wanted:
        if not denoise or flow.sigma_range is None:
            ways[f"denoise-{denoise:d}"] = {"denoise": denoise}
            continue
        for way in asked:
            steps = way.steps or flow.config.denoising_steps
            name = f"denoise-1-steps-{steps}" if len(asked) > 1 else "denoise-1"
            ways[name] = {"denoise": True, **way.arguments(), "denoise_steps": steps}
    return ways


def label_rule(args: argparse.Namespace, flow: TarFlow) -> str | None:
    """The rule of `sample_labels`, or None for an unconditional model."""
    if not flow.num_classes:
        if args.labels is not None:
            raise UserError(
                f"{args.model} is unconditional and takes no labels: leave --labels out"
            )
        return None
    rule = "random" if args.labels is None else args.labels
    if rule in ("random", "balanced"):
        return rule
    try:
        given = [int(label) for label in rule.split(",")]
    except ValueError as error:
        raise UserError(
            f"--labels is random, balanced or class ids such as 3,7, and not {rule!r}"
        ) from error
    if not 0 <= min(given) <= max(given) < flow.num_classes:
        raise UserError(f"--labels {rule}: the model's classes are 0 to {flow.num_classes - 1}")
    return ",".join(map(str, given))


def hash_weights(model: Path) -> str:
    return sha256(*sorted(model.glob("*.safetensors")))
