"""What samples depend on: the settings that a sample store is kept by."""

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.reference_set import sha256
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.options import class_numbers, denoising_of, guidance_of
from tarflow_dist.policy import dtype_name
from tarflow_dist.pretrained import TarFlow

UINT8_RULES = {  # flow/noise.py, to_pixels
    "gaussian": "round((x + 1) * 127.5), clipped",
    "uniform": "floor((x + 1) * 128), clipped",
}


def sweep_settings(
    args: argparse.Namespace, flow: TarFlow, weights_sha256: str
) -> dict[str, dict[str, Any]]:
    """The settings of each point of the sweep over --guidance and --denoise, as JSON values, under
    the name of the point: "" for a single one.

    Raises:
        UserError: guidance, denoising or labels that this model can't have.
    """
    denoise = args.denoise or [flow.noise == "gaussian"]
    if flow.noise == "uniform" and any(denoise):
        raise UserError(
            f"{args.model} was trained with uniform noise, which leaves nothing to denoise: leave "
            "--denoise out"
        )
    pairs = [(weight, score_step) for weight in args.guidance for score_step in denoise]
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
    denoising = denoising_of(args, flow)
    if flow.sigma_range is not None:
        steps = denoising.steps or flow.config.denoising_steps
        common |= replace(denoising, steps=steps).arguments()
    points = {}
    for weight, score_step in pairs:
        # the options are for a sweep's guided points
        unguided = weight == 0 and len(args.guidance) > 1
        guidance = Guidance() if unguided else guidance_of(args, weight, flow)
        name = f"guidance-{weight:g}-denoise-{int(score_step)}" if len(pairs) > 1 else ""
        points[name] = {
            **common,
            "sampler": flow.sampler(args.batch_size, guidance),
            **guidance.arguments(),
            "denoise": score_step,
        }
    return points


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
    return ",".join(map(str, class_numbers(rule, flow, least=0)))


def hash_weights(model: Path) -> str:
    return sha256(*sorted(model.glob("*.safetensors")))
