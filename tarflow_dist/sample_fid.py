"""Draws samples on any number of ranks and measures how close they come to a reference set.

    python -m tarflow_dist.sample_fid --model MODEL --reference SHARDS --num-samples 50000 \\
        --guidance 1.5 --annealed --inception-weights WEIGHTS.pth
    torchrun --nproc-per-node 8 -m tarflow_dist.sample_fid ...

The samples are the same on any number of ranks. To take up an interrupted run, run the same command
again: only the chunks that are missing are drawn. Several weights, --guidance 0,1,1.5, make a sweep
with a folder each, a table and curves.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.evaluation.features import EXTRACTORS, check_features
from tarflow_dist.options import add_denoising_options, add_dtype_option, add_guidance_options

if TYPE_CHECKING:
    from tarflow_dist.evaluation.wandb_log import TrainingRun

T = TypeVar("T")
FORMATS = ("npz", "folder", "tar")
# files that say whose folder it is
TAKEN = {
    "model.safetensors": "a model",
    "checkpoints": "a training run",
    "manifest.parquet": "a set of shards",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tarflow_dist.sample_fid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=shlex.join(["python", "-m", "tarflow_dist.sample_fid", *argv]))
    add = parser.add_argument_group("the samples").add_argument
    add("--model", type=Path, required=True, help="folder of model.safetensors and config.json")
    add("--num-samples", type=int, required=True, help="the field draws 50000")
    add("--guidance", type=weights, default="0", help="w, or several: 0,1,1.5; default 0: none")
    add_guidance_options(add)
    add(
        "--denoise",
        type=switches,
        help="remove the training noise: 0, 1, or 0,1 for both; default 1 if it was gaussian",
    )
    add_denoising_options(add)
    add(
        "--labels",
        help="of a conditional model: random, balanced, or class ids or names that take turns, "
        """3,dogs,"cats, big", where quotes make a name of what has a comma or is a number; """
        "default random",
    )
    add("--seed", type=int, default=0, help="of noise and labels; default 0")
    add("--batch-size", type=int, default=100, help="and samples a file; default 100")
    add_dtype_option(add)

    add = parser.add_argument_group("what they are compared with").add_argument
    add(
        "--reference",
        required=True,
        help="SHARDS folder made by data_prep, or its s3:// address; or an .npz: by "
        "tarflow_dist.reference, ADM's VIRTUAL_*.npz, pytorch-fid's",
    )
    add("--split", default="train", choices=("train", "val"), help="of SHARDS; default train")
    add("--features", default="inception", choices=EXTRACTORS, help="default inception")
    add("--inception-weights", type=Path, help="FID's Inception v3, a .pth file")

    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, help="folder of the samples; default samples/MODEL's name")
    add(
        "--write",
        type=formats,
        default="",
        help="further forms of the samples, one or several: npz (ADM's), folder (PNG files), tar "
        "(WebDataset); default none",
    )
    add(
        "--wandb",
        type=Path,
        metavar="RUN",
        help="a training run's folder: log figures and pictures to its Weights & Biases",
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("samples", args.model.resolve().name)
    return args


def weights(text: str) -> list[float]:
    return _parts(text, float)


def switches(text: str) -> list[bool]:
    return _parts(text, lambda part: bool(("0", "1").index(part)))


def formats(text: str) -> list[str]:
    return _parts(text, lambda part: FORMATS[FORMATS.index(part)]) if text else []


def _parts(text: str, parse: Callable[[str], T]) -> list[T]:
    """The parts of "a,b,c", no two of them equal."""
    try:
        parts = [parse(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"can't read {text!r}") from error
    if len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} names one twice")
    return parts


def check_arguments(args: argparse.Namespace) -> None:
    """What can be told without loading anything.

    Raises:
        UserError: a number out of range, or a path that leads nowhere or to something else.
    """
    if args.num_samples < 2:
        raise UserError("--num-samples must be at least 2: a covariance needs two images")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if not args.model.is_dir():
        raise UserError(f"--model {args.model} is not a folder")
    if "://" not in args.reference and not Path(args.reference).exists():
        raise UserError(f"--reference {args.reference} is not there")
    for name, what in TAKEN.items():
        if (args.out / name).exists():
            raise UserError(f"--out {args.out} is the folder of {what}: choose another for samples")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} can't be written to: {error.strerror}") from error
    if args.wandb is not None and not (args.wandb / "config.yaml").is_file():
        raise UserError(f"--wandb {args.wandb} is not the folder of a training run")
    check_features(args.features, args.inception_weights)


def find_training_run(folder: Path, model: Path) -> "TrainingRun":
    """The run that trained `model`, if it logs to Weights & Biases.

    Raises:
        UserError: it doesn't, or has no checkpoint yet.
    """
    from tarflow_dist import config as configs
    from tarflow_dist.evaluation.wandb_log import TrainingRun
    from tarflow_dist.pretrained import TarFlow
    from tarflow_dist.training import checkpoint, pointer

    log = configs.load_saved(folder)[0].log
    if log.wandb == "disabled":
        raise UserError(f"--wandb {folder}: this run was trained with log.wandb=disabled")
    newest = pointer.newest(folder / pointer.FOLDER)
    if newest is None:
        raise UserError(f"--wandb {folder}: this run has no checkpoint yet")
    state = checkpoint.Checkpoint(newest).state
    images = TarFlow.from_pretrained(model).provenance.get("images", state.images)
    return TrainingRun(folder, log, state.wandb_id, images)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    try:
        from tarflow_dist.evaluation.pipeline import run

        run(args, find_training_run(args.wandb, args.model) if args.wandb else None)
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
