"""What several commands take on their command line, and make of it."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tarflow_dist.errors import UserError

if TYPE_CHECKING:
    from tarflow_dist.flow.denoise import Denoising
    from tarflow_dist.flow.guidance import Guidance
    from tarflow_dist.flow.model import Flow
    from tarflow_dist.models.tarflow import TarFlow

T = TypeVar("T")

MODEL_HELP = "folder of model.safetensors and config.json, or USER/MODEL[@REVISION] at a hub"


def command_parser(name: str, doc: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """The parser of the command `name`, whose --help begins with its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m tarflow_dist.{name}",
        description=doc,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def check_writable(file: Path) -> None:
    """Raises `UserError` if `file` can't be written, before the work of which it is the result."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{file} can't be written: there is no folder {folder}")
    if file.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{file} is a folder, or in one that can't be written to")


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """For `several`: a part that is one of `names`."""
    return lambda part: names[names.index(part)]


def several(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """The parts of "a,b,c", no two of them equal."""

    def parts(text: str) -> list[T]:
        try:
            found = [parse(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"can't read {text!r}") from None
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} names one twice")
        return found

    return parts


def class_numbers(labels: str, flow: "TarFlow", least: int = -1) -> list[int]:
    """The classes that --labels names, by their ids or names.

    Raises:
        UserError: the model has no such class; ids begin at `least`.
    """
    try:
        numbers = flow.classes.numbers(labels)
    except ValueError as error:
        raise UserError(f"--labels {labels}: {error}") from error
    if not all(least <= number < flow.num_classes for number in numbers):
        none = ", or -1 for none" if least < 0 else ""
        raise UserError(f"--labels {labels}: class ids go from 0 to {flow.num_classes - 1}{none}")
    return numbers


def add_guidance_options(add: Callable[..., object]) -> None:
    """A command's own is --guidance, the weight or several."""
    add("--annealed", action="store_true", help="let w grow along the sequence, as published")
    add(
        "--guide",
        default="both",
        choices=("both", "mu", "alpha"),
        help="what is guided; default both",
    )
    add("--attn-temp", type=float, default=1.0, help="guides an unconditional model; default 1")
    add(
        "--rule",
        default="linear",
        choices=("linear", "gaussian", "scale"),
        help="how the two passes are combined: as published, as densities, or as published with "
        "iTARFlow; default linear",
    )
    add(
        "--guide-blocks",
        type=several(int),
        help="blocks that are guided, 0 the first, with commas; default all",
    )


def guidance_of(flow: "Flow", weight: float, args: argparse.Namespace) -> "Guidance":
    """The guidance of `weight`, in the way that `add_guidance_options` let choose.

    Raises:
        UserError: this model can't have it.
    """
    from tarflow_dist.flow.guidance import Guidance

    try:
        guidance = Guidance(
            weight, args.annealed, args.guide, args.attn_temp, args.rule, args.guide_blocks
        )
        guidance.check(conditional=flow.num_classes > 0, volume_preserving=flow.volume_preserving)
        guidance.per_block(len(flow.blocks))
    except ValueError as error:
        raise UserError(str(error)) from error
    return guidance


def add_denoising_options(
    add: Callable[..., object], *, steps: Callable[[str], object], more: str = ""
) -> None:
    """--denoise-steps is of the type `steps`."""
    add(
        "--denoise-steps",
        type=steps,
        metavar="K",
        help="of an iTARFlow: steps down from its largest noise level; default one each 0.01"
        + more,
    )
    add(
        "--denoise-order",
        type=int,
        choices=(1, 2),
        default=1,
        help="of an iTARFlow: 2 needs a third of the steps; default 1, as published",
    )
    add(
        "--denoise-clip",
        action="store_true",
        help="of an iTARFlow: keep what each step aims at in the range of pixels",
    )
    add(
        "--denoise-stochastic",
        action="store_true",
        help="of an iTARFlow: add new noise at each step",
    )


def denoising_of(
    flow: "Flow", steps: int | None, args: argparse.Namespace, *, wanted: bool
) -> "Denoising":
    """The denoising in `steps`, in the way that `add_denoising_options` let choose.

    Args:
        wanted: whether anything is denoised.

    Raises:
        UserError: this model can't have it, or nothing is denoised.
    """
    from tarflow_dist.flow.denoise import Denoising

    try:
        asked = Denoising(steps, args.denoise_clip, args.denoise_stochastic, args.denoise_order)
    except ValueError as error:
        raise UserError(f"--denoise-…: {error}") from error
    if asked != Denoising() and (flow.sigma_range is None or not wanted):
        why = "and nothing is" if not wanted else "and this model has one noise level"
        raise UserError(
            "--denoise-steps, --denoise-order, --denoise-clip and --denoise-stochastic say how an "
            f"iTARFlow's samples are denoised, {why}: leave them out"
        )
    return asked


def add_dtype_option(add: Callable[..., object]) -> None:
    add(
        "--dtype",
        choices=("bfloat16", "float32", "float64"),
        help="type that the model computes in; default bfloat16 on a GPU, else that of its weights",
    )


def load_model(
    model: Path, device: str | None, dtype: str | None, *, calibrated: bool = True
) -> "TarFlow":
    """The model in the folder `model` on `device`, which computes in `dtype`; None takes a GPU if
    there is one, and --dtype's default.

    Raises:
        UserError: the model can't be read, or there is no such device.
    """
    import torch

    from tarflow_dist.models.tarflow import TarFlow

    flow = TarFlow.from_pretrained(model, calibrated=calibrated).requires_grad_(False)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None and place.type == "cuda":
            dtype = "bfloat16"
        return flow.to(place, getattr(torch, dtype) if dtype else None)
    except (RuntimeError, AssertionError) as error:  # what torch says of a device it lacks
        raise UserError(f"--device {device or 'cuda'}: {str(error).splitlines()[0]}") from error
