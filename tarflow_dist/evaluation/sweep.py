"""What the samples of each point of a sweep, or of the only one, depend on."""

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tarflow_dist.errors import UserError
from tarflow_dist.flow.denoise import Denoising
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.models.sampling_policy import dtype_name
from tarflow_dist.models.tarflow import TarFlow
from tarflow_dist.options import class_numbers, denoising_of, guidance_of

UINT8_RULES = {  # flow/noise.py, to_pixels
    "gaussian": "round((x + 1) * 127.5), clipped",
    "uniform": "floor((x + 1) * 128), clipped",
}


@dataclass(frozen=True)
class SampleSettings:
    """A sample store is kept by these: equal settings give equal samples.

    Attributes:
        chunk_size: samples drawn at once, and in a file.
        labels: a rule of `sample_labels`, or None for an unconditional model.
        class_counts: images of each class, for the rule "reference".
        sampler: how the flow is inverted, in words.
        denoising: None leaves the training noise in; its steps are None for a TARFlow, which takes
            one.
    """

    weights_sha256: str
    config_sha256: str
    dtype: str
    num_samples: int
    chunk_size: int
    seed: int
    labels: str | None
    uint8_rule: str
    sampler: str
    guidance: Guidance
    denoising: Denoising | None
    class_counts: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As settings.json and result.json have them."""
        saved = {**vars(self), **self.guidance.arguments(), "denoise": self.denoising is not None}
        del saved["denoising"]
        if self.class_counts is None:
            del saved["class_counts"]
        else:
            saved["class_counts"] = list(self.class_counts)
        if self.denoising is not None and self.denoising.steps is not None:
            saved |= self.denoising.arguments()
        return saved


def sweep_settings(
    args: argparse.Namespace,
    flow: TarFlow,
    weights_sha256: str,
    class_counts: tuple[int, ...] | None = None,
) -> dict[str, SampleSettings]:
    """The settings of each point of the sweep over --guidance, --denoise and --denoise-steps, by
    the name of the point: "" for a single one.

    Raises:
        UserError: guidance, denoising or labels that this model can't have.
    """
    config = json.dumps(flow.config.to_json()).encode()
    labels = label_rule(args, flow)
    if labels == "reference" and class_counts is None:
        raise UserError(
            f"--labels reference: {args.reference} doesn't say how many images each class has: "
            "give the data set, or a file that tarflow_dist.reference wrote"
        )
    points = {}
    for weight, (way, denoising) in product(args.guidance, denoising_ways(args, flow).items()):
        # the options are for a sweep's guided points
        unguided = weight == 0 and len(args.guidance) > 1
        guidance = Guidance() if unguided else guidance_of(flow, weight, args)
        points[f"guidance-{weight:g}-{way}"] = SampleSettings(
            weights_sha256=weights_sha256,
            config_sha256=hashlib.sha256(config).hexdigest(),
            dtype=dtype_name(next(flow.parameters()).dtype),
            num_samples=args.num_samples,
            chunk_size=args.batch_size,
            seed=args.seed,
            labels=labels,
            class_counts=class_counts if labels == "reference" else None,
            uint8_rule=UINT8_RULES[flow.noise],
            sampler=flow.sampler(args.batch_size, guidance),
            guidance=guidance,
            denoising=denoising,
        )
    return points if len(points) > 1 else {"": next(iter(points.values()))}


def denoising_ways(args: argparse.Namespace, flow: TarFlow) -> dict[str, Denoising | None]:
    """Each way of denoising in the sweep, by its part of the points' names."""
    wanted = args.denoise or [flow.noise == "gaussian"]
    if flow.noise == "uniform" and any(wanted):
        raise UserError(
            f"{args.model} was trained with uniform noise, which leaves nothing to denoise: leave "
            "--denoise out"
        )
    steps = args.denoise_steps or [None]
    asked = [denoising_of(flow, count, args, wanted=any(wanted)) for count in steps]
    if flow.sigma_range is not None:
        asked = [replace(way, steps=way.steps or flow.config.denoising_steps) for way in asked]
    denoised: dict[str, Denoising | None] = {f"denoise-1-steps-{w.steps}": w for w in asked}
    if len(asked) == 1:
        denoised = {"denoise-1": asked[0]}
    ways: dict[str, Denoising | None] = {}
    for denoise in wanted:
        ways |= denoised if denoise else {"denoise-0": None}
    return ways


def label_rule(args: argparse.Namespace, flow: TarFlow) -> str | None:
    """The rule of `sample_labels`, or None for an unconditional model."""
    if not flow.num_classes and args.labels is not None:
        raise UserError(f"{args.model} is unconditional and takes no labels: leave --labels out")
    if not flow.num_classes:
        return None
    rule = "random" if args.labels is None else args.labels
    if rule in ("random", "balanced", "reference"):
        return rule
    return ",".join(map(str, class_numbers(rule, flow, least=0)))
