"""Draws samples on any number of ranks and measures how close they come to a reference set.

    python -m tarflow_dist.sample_fid --model MODEL --reference SHARDS --num-samples 50000 \\
        --guidance 1.5 --annealed --inception-weights WEIGHTS.pth
    torchrun --nproc-per-node 8 -m tarflow_dist.sample_fid ...

The samples are the same on any number of ranks. To take up an interrupted run, run the same command
again: only the chunks that are missing are drawn. Several weights, --guidance 0,1,1.5, make a sweep
with a folder each, a table and curves; so do an iTARFlow's --denoise-steps 5,10,30. Images that
another program drew are measured by --samples instead of --model.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.evaluation.features import EXTRACTORS, check_features
from tarflow_dist.models import hub
from tarflow_dist.options import (
    MODEL_HELP,
    add_denoising_options,
    add_dtype_option,
    add_guidance_options,
    class_numbers,
    command_parser,
    denoising_of,
    guidance_of,
    load_model,
    one_of,
    several,
)

if TYPE_CHECKING:
    from tarflow_dist.evaluation.image_sets import Samples
    from tarflow_dist.evaluation.sweep import SampleSettings
    from tarflow_dist.flow.denoise import Denoising
    from tarflow_dist.models.tarflow import TarFlow

FORMATS = ("npz", "folder", "tar")
# files that say whose folder it is
TAKEN = {"model.safetensors": "a model", "checkpoints": "a training run"}
TAKEN |= {"manifest.parquet": "a set of shards"}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("sample_fid", __doc__)
    parser.set_defaults(command=shlex.join(["python", "-m", "tarflow_dist.sample_fid", *argv]))
    drawing = parser.add_argument_group("the samples")
    source = drawing.add_mutually_exclusive_group(required=True).add_argument
    source("--model", type=Path, help=MODEL_HELP)
    source(
        "--samples",
        type=Path,
        help="instead of a model, what is drawn already: a folder of pictures, an .npz of ADM's "
        "form, or the folder of samples of this command",
    )
    of_model: list[argparse.Action] = []

    def add(*names: str, **options: Any) -> None:
        of_model.append(drawing.add_argument(*names, **options))

    add("--num-samples", type=int, help="of a model; the field draws 50000")
    add("--guidance", type=several(float), default=[0.0], help="w, or several; default 0: none")
    add_guidance_options(add)
    add(
        "--denoise",
        type=several(lambda part: bool(("0", "1").index(part))),
        help="remove the training noise: 0, 1, or 0,1 for both; default 1 if it was gaussian",
    )
    add_denoising_options(add, steps=several(int), more="; several make a sweep")
    add(
        "--labels",
        help="of a conditional model: random, balanced, reference (its mix of classes), or class "
        "ids or names that take turns, "
        """3,dogs,"cats, big", where quotes make a name of what has a comma or is a number; """
        "default random",
    )
    add("--seed", type=int, default=0, help="of noise and labels; default 0")
    add_dtype_option(add)
    drawing.add_argument(
        "--batch-size", type=int, default=100, help="and samples a file; default 100"
    )

    compared = parser.add_argument_group("what they are compared with").add_argument
    compared(
        "--reference",
        required=True,
        help="SHARDS folder made by data_prep, or its s3:// address; or an .npz: by "
        "tarflow_dist.reference, ADM's VIRTUAL_*.npz, pytorch-fid's",
    )
    compared("--split", default="train", choices=("train", "val"), help="of SHARDS; default train")
    compared(
        "--features",
        type=several(one_of(EXTRACTORS)),
        default=["inception"],
        help=f"one or several of {', '.join(EXTRACTORS)}; the first decides; default inception",
    )
    compared("--inception-weights", type=Path, help="FID's Inception v3, a .pth file")

    written = parser.add_argument_group("what is written").add_argument
    written("--out", type=Path, help="folder of the samples; default samples/MODEL's name")
    written(
        "--write",
        type=several(one_of(FORMATS)),
        default=[],
        help="further forms of the samples, one or several: npz (ADM's), folder (PNG files), tar "
        "(WebDataset); default none",
    )
    written(
        "--wandb",
        type=Path,
        metavar="RUN",
        help="a training run's folder: log figures and pictures to its Weights & Biases and its "
        "TensorBoard, where it has them",
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("samples", (args.model or args.samples).resolve().name)
    if args.model is not None and args.num_samples is None:
        parser.error("--num-samples is missing: how many to draw")
    if args.samples is not None:
        wanted = [a.option_strings[0] for a in of_model if vars(args)[a.dest] != a.default]
        if wanted or args.write:
            parser.error(
                f"--samples are there already: leave out {', '.join(wanted) or '--write'}, which "
                "are for those of a --model"
            )
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """What can be told without loading anything.

    Raises:
        UserError: a number out of range, or a path that leads nowhere or to something else.
    """
    if args.num_samples is not None and args.num_samples < 2:
        raise UserError("--num-samples must be at least 2: a covariance needs two images")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if args.model is not None:
        hub.check(args.model)
    if args.samples is not None and not args.samples.exists():
        raise UserError(f"--samples {args.samples} is not there")
    if "://" not in args.reference and not Path(args.reference).exists():
        raise UserError(f"--reference {args.reference} is not there")
    for name, what in TAKEN.items():
        if (args.out / name).exists():
            raise UserError(f"--out {args.out} is the folder of {what}: choose another for samples")
    if args.wandb is not None and not (args.wandb / "config.yaml").is_file():
        raise UserError(f"--wandb {args.wandb} is not the folder of a training run")
    check_features(args.features, args.inception_weights)


def sweep_settings(
    args: argparse.Namespace,
    flow: "TarFlow",
    weights_sha256: str,
    class_counts: tuple[int, ...] | None = None,
) -> "dict[str, SampleSettings]":
    """The settings of each point of the sweep over --guidance, --denoise and --denoise-steps.

    Raises:
        UserError: guidance, denoising or labels that this model can't have.
    """
    from tarflow_dist.evaluation.sweep import UINT8_RULES, SampleSettings, named
    from tarflow_dist.flow.guidance import Guidance
    from tarflow_dist.models.sampling_policy import dtype_name

    config = json.dumps(flow.config.to_json()).encode()
    labels = label_rule(args, flow)
    if labels == "reference" and class_counts is None:
        raise UserError(
            f"--labels reference: {args.reference} doesn't say how many images each class has: "
            "give the data set, or a file that tarflow_dist.reference wrote"
        )
    settings = []
    for weight, denoising in product(args.guidance, denoising_ways(args, flow)):
        # the options are for a sweep's guided points
        unguided = weight == 0 and len(args.guidance) > 1
        guidance = Guidance() if unguided else guidance_of(flow, weight, args)
        settings.append(
            SampleSettings(
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
        )
    return named(settings)


def denoising_ways(args: argparse.Namespace, flow: "TarFlow") -> "list[Denoising | None]":
    """Each way of denoising in the sweep."""
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
    return [way for denoise in wanted for way in (asked if denoise else [None])]


def label_rule(args: argparse.Namespace, flow: "TarFlow") -> str | None:
    """The rule of `sample_labels`, or None for an unconditional model."""
    if not flow.num_classes and args.labels is not None:
        raise UserError(f"{args.model} is unconditional and takes no labels: leave --labels out")
    if not flow.num_classes:
        return None
    rule = "random" if args.labels is None else args.labels
    if rule in ("random", "balanced", "reference"):
        return rule
    return ",".join(map(str, class_numbers(rule, flow, least=0)))


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """The body is the stage `name`, or a further part of it, and its time goes into `seconds`."""
    began = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - began, 3)


def run(args: argparse.Namespace) -> None:
    """Draws, measures, compares and reports, on all ranks."""
    from tarflow_dist import distributed
    from tarflow_dist.evaluation.draw import draw
    from tarflow_dist.evaluation.feature_set import FeatureSet
    from tarflow_dist.evaluation.features import make_extractor
    from tarflow_dist.evaluation.image_sets import ShardImages
    from tarflow_dist.evaluation.measure import measure_reference, measure_samples
    from tarflow_dist.evaluation.metrics import compare
    from tarflow_dist.evaluation.neighbours import Neighbours
    from tarflow_dist.evaluation.reference_set import open_reference
    from tarflow_dist.evaluation.report import find_training_run, report
    from tarflow_dist.evaluation.result import results_of
    from tarflow_dist.evaluation.sample_store import open_samples
    from tarflow_dist.files import sha256

    # rank 0 reports alone, which can take minutes, and the others wait
    device = distributed.init(timeout=timedelta(days=1))
    seconds: dict[str, float] = {}  # of the stages that all points share
    facts = {"command": args.command}
    drawn: Mapping[str, Samples]  # of each point of a sweep, by its name
    with stage(seconds, "loading"):
        if args.model is not None:
            model = hub.find_on_all_ranks(args.model)
            flow = load_model(model.folder, str(device), args.dtype)
            image_shape, num_classes = flow.image_shape, flow.num_classes
            class_names, provenance = flow.class_names, flow.provenance
            facts["model"] = model.name
        else:
            drawn = {"": open_samples(args.samples)}
            image_shape, num_classes, class_names, provenance = drawn[""].image_shape, 0, [], {}
        training_run = find_training_run(args.wandb, provenance) if args.wandb else None
        extractors = [
            make_extractor(name, image_shape, args.inception_weights, device)
            for name in args.features
        ]
        reference = open_reference(
            args.reference,
            args.split,
            image_shape=image_shape,
            num_classes=num_classes,
            extractors=extractors,
        )
        if args.model is not None:
            files = sorted(model.folder.glob("*.safetensors"))
            weights_sha256 = distributed.from_main(sha256(*files) if distributed.is_main() else "")
            settings = sweep_settings(args, flow, weights_sha256, reference.class_counts)
    with distributed.lock_folder(args.out):
        if args.model is not None:
            drawn = draw(flow, settings, args.out, device)
        neighbours = None
        if isinstance(reference.images, ShardImages):  # where any image is found at once
            neighbours = Neighbours([*drawn.values()], reference.images, extractors[0], device)
        sizes: dict[str, Any] = {"batch_size": args.batch_size, "device": device}
        compared: dict[str, list[dict[str, Any]]] = {name: [] for name in drawn}
        for place, extractor in enumerate(extractors):
            file = "features.npz" if place == 0 else f"features-{extractor.name}.npz"
            for name, samples in drawn.items():
                with stage(samples.about["seconds"], "sample_features"):
                    label = f"features {name}".rstrip()
                    measure_samples(samples, extractor, args.out / name / file, label, **sizes)
            with stage(seconds, "reference_features"):
                sought = neighbours if place == 0 else None  # the report shows no others
                real = measure_reference(reference, extractor, **sizes, neighbours=sought)
            for name, samples in drawn.items():
                distributed.say(f"comparing {extractor.dim} features {name}".rstrip())
                with stage(samples.about["seconds"], "metrics"):
                    features = FeatureSet.load(args.out / name / file)  # one point's at a time
                    compared[name].append(compare(features, real, device))
        results = results_of(drawn, compared, reference, facts, seconds, device)
        if distributed.is_main():
            report(
                args.out,
                drawn,
                results,
                formats=args.write,
                class_names=class_names or reference.class_names,
                neighbours=neighbours,
                training_run=training_run,
            )
    distributed.shutdown()


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} can't be written to: {error.strerror}") from error
    try:
        run(args)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"interrupted: what is drawn stays in {args.out}, and the same command goes on "
                "from there",
                file=sys.stderr,
            )
        raise


if __name__ == "__main__":
    run_command(main)
