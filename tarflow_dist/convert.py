"""Turns a checkpoint into a model folder: model.safetensors and config.json.

SOURCE is a run's folder or one of its checkpoints, a DeepSpeed checkpoint of another program (with
--trust-pickle), or a .pth file with a TARFlow in it, as published or as a trainer saved it (with
--sigma), or an iTARFlow (with --sigma-range).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.models.classes import NAMELESS, Classes
from tarflow_dist.options import command_parser
from tarflow_dist.training import latest_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float64", "float32", "bfloat16", "float16")
RUN_WEIGHTS = {"ema": "ema", "raw": "weights"}
RUN_OPTIONS = ("weights",)
FOREIGN_OPTIONS = (
    *("trust_pickle", "sigma", "uniform", "sigma_range", "in_channels", "head_dim", "key"),
)


class Source(NamedTuple):
    """What a checkpoint says of a model."""

    weights: dict[str, "Tensor"]
    config: FlowConfig
    provenance: dict[str, Any]
    classes: Classes


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    read = _read_run if latest_checkpoint.is_run(args.source) else _read_foreign
    weights, config, provenance, classes = read(args.source, args)

    import torch

    from tarflow_dist.models.tarflow import TarFlow

    if args.dtype:
        dtype = getattr(torch, args.dtype)
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    flow = TarFlow.with_weights(config, weights, source=args.source)
    for name, tensor in flow.state_dict().items():
        if not tensor.isfinite().all():
            kind = f"in {args.dtype} " if args.dtype else ""
            raise UserError(f"{args.source} makes no model: its {name} {kind}is not finite")
    flow.provenance = {"source": str(args.source), **provenance}
    flow.classes = classes
    flow.save_pretrained(args.out)
    count = sum(p.numel() for p in flow.parameters())
    dtype = next(flow.parameters()).dtype
    shown = f"{flow.config.width} wide in heads of {flow.config.head_dim}"
    print(f"{args.out}: {count / 1e6:.4g} M parameters, {shown}, {dtype}".replace("torch.", ""))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises:
    UserError: there is no source, it is a model, or options don't apply to it.
    """
    parser = command_parser("convert", __doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE")
    add("out", type=Path, metavar="OUT", help="the model's folder")
    add(
        "--weights",
        choices=RUN_WEIGHTS,
        help="of a run: the weights' moving average (ema, the default) or the weights themselves",
    )
    add("--dtype", choices=DTYPES, help="type of the weights (default: as they are)")
    add(
        "--trust-pickle",
        action="store_true",
        help="let DeepSpeed unpickle its checkpoint, which can run code hidden in it",
    )
    foreign = parser.add_argument_group("for checkpoints that hold weights alone (.pth, DeepSpeed)")
    add = foreign.add_argument
    add("--sigma", type=float, help="std of the Gaussian noise it was trained with")
    add("--uniform", action="store_true", help="it was trained with uniform noise, without a sigma")
    add(
        "--sigma-range",
        type=float,
        nargs=2,
        metavar=("LEAST", "LARGEST"),
        help="noise levels that an iTARFlow was trained with",
    )
    add("--key", help="which state dict in it, such as model or ema")
    add("--in-channels", type=int, default=3, help="channels of its images (default 3)")
    # heads leave no trace in the shapes; the published models' are 64 wide
    add("--head-dim", type=int, default=64, help="channels an attention head (default 64)")
    args = parser.parse_args(argv)
    if not args.source.exists():
        raise UserError(f"there is no {args.source}")
    if (args.source / "model.safetensors").exists():
        raise UserError(f"{args.source} is a model already, as TarFlow.from_pretrained loads it")
    if (args.out / "model.safetensors").exists():
        raise UserError(f"{args.out} holds a model already: choose another folder, or remove it")
    is_run = latest_checkpoint.is_run(args.source)
    idle = FOREIGN_OPTIONS if is_run else RUN_OPTIONS
    if given := [name for name in idle if vars(args)[name] != parser.get_default(name)]:
        kind = "a run of ours" if is_run else "no run of ours"
        option = given[0].replace("_", "-")
        raise UserError(
            f"{args.source} is {kind}, to which --{option} does not apply: leave it out"
        )
    return args


def _read_run(source: Path, args: argparse.Namespace) -> Source:
    from tarflow_dist.training.checkpoint import open_run

    saved = open_run(source)
    kind = args.weights or "ema"
    weights = saved.read_all(RUN_WEIGHTS[kind]) | saved.read_all("buffers")
    provenance = {"images": saved.state.images, "weights": kind}
    return Source(weights, saved.model, provenance, saved.classes)


def _read_foreign(source: Path, args: argparse.Namespace) -> Source:
    from tarflow_dist.training import foreign_checkpoint

    if source.is_dir() and not (source / "latest").is_file():
        raise UserError(
            f"{source} is neither a run's folder, nor one of its checkpoints, nor a DeepSpeed "
            "checkpoint, which has a file latest"
        )
    given = (args.sigma is not None, args.sigma_range is not None, args.uniform)
    if sum(given) != 1:
        raise UserError(
            f"{source} doesn't say what noise it was trained with: give either --sigma S or "
            "--uniform, or for an iTARFlow --sigma-range LEAST LARGEST"
        )
    if source.is_file():
        weights = foreign_checkpoint.read_published(source, args.key)
    elif args.trust_pickle:
        weights = foreign_checkpoint.read_deepspeed(source, args.key)
    else:
        raise UserError(
            f"{source} is no run of ours; if it is a DeepSpeed checkpoint that you trust, whose "
            "reading can run code hidden in it, add --trust-pickle"
        )
    model = foreign_checkpoint.infer_config(weights, in_channels=args.in_channels, source=source)
    has_levels = any(".time_embed." in name for name in weights)
    if has_levels != (args.sigma_range is not None):
        kind, option = ("an iTARFlow", "--sigma-range") if has_levels else ("a TARFlow", "--sigma")
        raise UserError(f"{source} is {kind}, for which {option} says the noise")
    model |= {
        "noise": "uniform" if args.uniform else "gaussian",
        "sigma": args.sigma,
        "sigma_range": args.sigma_range,
        "head_dim": args.head_dim,
    }
    try:
        return Source(weights, FlowConfig(**model), {}, NAMELESS)
    except ValueError as error:
        raise UserError(f"{source} makes no TARFlow: {error}") from error


if __name__ == "__main__":
    run_command(main)
