"""Turns a checkpoint into a model folder: model.safetensors and config.json.

SOURCE is a run's folder or one of its checkpoints, a DeepSpeed checkpoint of another program (with
--trust-pickle), or a .pth file with a TARFlow in it, as published or as a trainer saved it (with
--sigma), or an iTARFlow (with --sigma-range).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tarflow_dist.errors import UserError, run_command
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
    sizes: dict[str, Any]
    """The arguments of `Flow`."""
    provenance: dict[str, Any]
    classes: Classes


def main(argv: list[str]) -> None:
    parser = command_parser("convert", __doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT", help="the model's folder")
    parser.add_argument(
        "--weights",
        choices=RUN_WEIGHTS,
        help="of a run: the weights' moving average (ema, the default) or the weights themselves",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights (default: as they are)"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="let DeepSpeed unpickle its checkpoint, which can run code hidden in it",
    )
    foreign = parser.add_argument_group("for checkpoints that hold weights alone (.pth, DeepSpeed)")
    foreign.add_argument(
        "--sigma", type=float, help="std of the Gaussian noise it was trained with"
    )
    foreign.add_argument(
        "--uniform", action="store_true", help="it was trained with uniform noise, without a sigma"
    )
    foreign.add_argument(
        "--sigma-range",
        type=float,
        nargs=2,
        metavar=("LEAST", "LARGEST"),
        help="noise levels that an iTARFlow was trained with",
    )
    foreign.add_argument("--key", help="which state dict in it, such as model or ema")
    foreign.add_argument("--in-channels", type=int, help="channels of its images (default 3)")
    foreign.add_argument("--head-dim", type=int, help="channels an attention head (default 64)")
    arguments = parser.parse_args(argv)
    convert(arguments)


def convert(arguments: argparse.Namespace) -> None:
    source, out = arguments.source, arguments.out
    if not source.exists():
        raise UserError(f"there is no {source}")
    if (source / "model.safetensors").exists():
        raise UserError(f"{source} is a model already, as TarFlow.from_pretrained loads it")
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} holds a model already: choose another folder, or remove it")
    is_run = latest_checkpoint.is_run(source)
    idle = FOREIGN_OPTIONS if is_run else RUN_OPTIONS
    if given := [name for name in idle if getattr(arguments, name) not in (None, False)]:
        kind = "a run of ours" if is_run else "no run of ours"
        option = given[0].replace("_", "-")
        raise UserError(f"{source} is {kind}, to which --{option} does not apply: leave it out")
    weights, sizes, provenance, classes = (_read_run if is_run else _read_foreign)(
        source, arguments
    )

    import torch

    from tarflow_dist.models.tarflow import TarFlow

    if arguments.dtype:
        dtype = getattr(torch, arguments.dtype)
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    try:
        with torch.device("meta"):
            flow = TarFlow(**sizes)
    except ValueError as error:
        raise UserError(f"{source} makes no TARFlow: {error}") from error
    flow.load_weights(weights, source=source)
    for name, tensor in flow.state_dict().items():
        if not tensor.isfinite().all():
            kind = f"in {arguments.dtype} " if arguments.dtype else ""
            raise UserError(f"{source} makes no model: its {name} {kind}is not finite")
    flow.provenance = {"source": str(source), **provenance}
    flow.classes = classes
    try:
        flow.save_pretrained(out)
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror}") from error
    count = sum(p.numel() for p in flow.parameters())
    dtype = next(flow.parameters()).dtype
    shown = f"{flow.config.width} wide in heads of {flow.config.head_dim}"
    print(f"{out}: {count / 1e6:.4g} M parameters, {shown}, {dtype}".replace("torch.", ""))


def _read_run(source: Path, arguments: argparse.Namespace) -> Source:
    from tarflow_dist.training.checkpoint import open_run

    saved = open_run(source)
    kind = arguments.weights or "ema"
    weights = saved.read_all(RUN_WEIGHTS[kind]) | saved.read_all("buffers")
    provenance = {"images": saved.state.images, "weights": kind}
    return Source(weights, saved.model.to_json(), provenance, saved.classes)


def _read_foreign(source: Path, arguments: argparse.Namespace) -> Source:
    from tarflow_dist.training import foreign_checkpoint

    if source.is_dir() and not (source / "latest").is_file():
        raise UserError(
            f"{source} is neither a run's folder, nor one of its checkpoints, nor a DeepSpeed "
            "checkpoint, which has a file latest"
        )
    given = (arguments.sigma is not None, arguments.sigma_range is not None, arguments.uniform)
    if sum(given) != 1:
        raise UserError(
            f"{source} doesn't say what noise it was trained with: give either --sigma S or "
            "--uniform, or for an iTARFlow --sigma-range LEAST LARGEST"
        )
    if source.is_file():
        weights = foreign_checkpoint.read_published(source, arguments.key)
    elif arguments.trust_pickle:
        weights = foreign_checkpoint.read_deepspeed(source, arguments.key)
    else:
        raise UserError(
            f"{source} is no run of ours; if it is a DeepSpeed checkpoint that you trust, whose "
            "reading can run code hidden in it, add --trust-pickle"
        )
    model = foreign_checkpoint.infer_config(
        weights,
        in_channels=3 if arguments.in_channels is None else arguments.in_channels,
        source=source,
    )
    has_levels = any(".time_embed." in name for name in weights)
    if has_levels != (arguments.sigma_range is not None):
        kind, option = ("an iTARFlow", "--sigma-range") if has_levels else ("a TARFlow", "--sigma")
        raise UserError(f"{source} is {kind}, for which {option} says the noise")
    noise = {
        "noise": "uniform" if arguments.uniform else "gaussian",
        "sigma": arguments.sigma,
        "sigma_range": arguments.sigma_range,
    }
    # heads leave no trace in the shapes; the published models' are 64 wide
    head_dim = 64 if arguments.head_dim is None else arguments.head_dim
    return Source(weights, {**model, **noise, "head_dim": head_dim}, {}, NAMELESS)


if __name__ == "__main__":
    run_command(main)
