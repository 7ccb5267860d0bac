"""The command line: images to OUT/mds/ and OUT/wds/, each a set; finished sets to be looked at."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import show, verify
from data_prep.images import CROPS, ENCODINGS
from data_prep.prepare import help_prepare, prepare
from data_prep.settings import HONEST_PIXELS, Settings
from data_prep.sources import LAYOUTS, Digits, Source, open_source
from data_prep.sources.names import listed, say_passed_over
from data_prep.sources.storage import source_path
from data_prep.upload import is_remote, prepare_and_upload
from tarflow_dist.errors import INTERRUPTED_EXIT_CODE, UserError

MAX_SIZE, MAX_WORKERS = 4096, 1024
MAX_PASSED_OVER = 0.5
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "seed": (lambda seed: 0 <= seed < 2**32, f"a number from 0 to {2**32 - 1}"),
    "workers": (lambda count: 1 <= count <= MAX_WORKERS, f"a number from 1 to {MAX_WORKERS}"),
    "size": (lambda side: 0 < side <= MAX_SIZE, f"a side from 1 to {MAX_SIZE} pixels"),
    "val_fraction": (lambda share: 0 < share < 1, "a share such as 0.1"),
    "max_pixels": (lambda count: count >= 1, f"a number such as {HONEST_PIXELS}"),
    "max_passed_over": (lambda share: 0 <= share <= 1, f"a share such as {MAX_PASSED_OVER}"),
    "max_errors": (lambda share: 0 <= share <= 1, "a share such as 0.01"),
}
"""Whether an option's value can be, and what to give."""
FORMATS = {"mds": ["mds"], "wds": ["wds"], "both": ["mds", "wds"]}
LAYOUT_HELP = """what SRC is (default: what is found there)
folder: SRC/{train,val}/CLASS/…/IMAGE, or SRC/CLASS/…/IMAGE; without CLASS, an unconditional set;
archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which
are read as they lie;
kaggle: ILSVRC/Data/CLS-LOC/, LOC_val_solution.csv and LOC_synset_mapping.txt;
parquet: Hugging Face's train-*.parquet and validation-*.parquet, in SRC or SRC/data;
npz: the downsampled ImageNet's train_data_batch_*.npz and val_data.npz;
wds: WebDataset tars, an image and its .cls or .json a sample, named after their splits;
mds: MosaicML streaming's SRC/{train,val}/index.json, an image x and its label y a sample;
edm: StyleGAN's and EDM's SRC.zip, or folder, with images and dataset.json;
arrow: what save_to_disk of Hugging Face's datasets writes"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Write images as shards: OUT/mds/ (MosaicML streaming) and OUT/wds/ "
        "(WebDataset tar), each with train/, val/, manifest.parquet, summary.json, errors.parquet. "
        "The same command goes on where a killed one was.",
    )
    commands = top.add_subparsers(dest="command", required=True)

    imagenet = commands.add_parser("imagenet", help="ImageNet or another set, as it lies")
    imagenet.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help=LAYOUT_HELP)
    folder = commands.add_parser(
        "folder",
        help="a folder of class folders, or of pictures",
        description="SRC/CLASS/…/image, or SRC/{train,val}/CLASS/…/image. Labels are the classes' "
        "positions in sorted order; images come out in RGB. Without class folders, SRC/image or "
        "SRC/{train,val}/image, it is an unconditional set.",
    )
    folder.set_defaults(layout="folder")
    for command in (imagenet, folder):
        command.set_defaults(run=run_images, format="mds", workers=None)
        command.add_argument(
            "src", help="the folder with the images, or a zip; may be an address s3://…"
        )
        _add_image_options(command)

    digits = commands.add_parser("digits", help="scikit-learn's handwritten digits, 8x8, built in")
    digits.set_defaults(run=run_digits, format="both", workers=1, size=Digits.size)
    digits.add_argument("--encode", choices=("png", "jpeg", "raw"), default="png", help=ENCODE_HELP)
    for command in (imagenet, folder, digits):
        command.add_argument(
            "out", help="where the sets are written: a folder, or an object store's s3://…"
        )
        command.add_argument("--format", choices=FORMATS, help="(default %(default)s)")
        command.add_argument("--seed", type=int, default=0, help="of split and order (default 0)")
        command.add_argument(
            "--workers",
            type=int,
            help="processes; they change no byte (default: 1 for digits, else one a core)",
        )

    for name, module, help_ in (
        ("verify", verify, "read a finished set back and say what is wrong with it"),
        ("show", show, "print a set's summary and draw a contact sheet"),
    ):
        command = commands.add_parser(name, help=help_)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


ENCODE_HELP = (
    "png (default) and webp are lossless, webp is smaller and slower to write; jpeg has quality "
    "95, 4:4:4; raw is the pixels, largest and fastest to read; keep stores the files as they are, "
    "for other trainers: ours needs images of one size"
)


def _add_image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", type=int, help="side of the square images; not with keep")
    command.add_argument(
        "--crop",
        choices=CROPS,
        default="adm",
        help="resize and centre crop as ADM does (default), or as TarFlow does",
    )
    command.add_argument("--encode", choices=ENCODINGS, default="png", help=ENCODE_HELP)
    command.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="share of each class held out for val, at least one image, where SRC has no val "
        "(default %(default)s)",
    )
    command.add_argument(
        "--max-errors",
        type=float,
        default=0.01,
        help="stop when more than this share of the images, and more than 10, can't be read "
        "(default %(default)s)",
    )
    command.add_argument(
        "--max-pixels",
        type=int,
        default=HONEST_PIXELS,
        help="images of more are set aside, since a small file that unpacks to too many can be an "
        "attack; Pillow takes up to 4 bytes a pixel of memory (default %(default)s)",
    )
    command.add_argument(
        "--max-passed-over",
        type=float,
        default=MAX_PASSED_OVER,
        help="stop when more than this share of the files in SRC are none of the set's images "
        "(default %(default)s)",
    )


def _cores() -> int:
    """This process's, as far as Slurm or the system tells."""
    if told := os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(told)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_digits(args: argparse.Namespace) -> int:
    return _run(args, Digits.path, partial(Digits, seed=args.seed))


def run_images(args: argparse.Namespace) -> int:
    src = source_path(args.src)
    return _run(args, src, partial(_open, args, src))


def _open(args: argparse.Namespace, src: Path) -> Source:
    source = open_source(src, layout=args.layout, val_fraction=args.val_fraction, seed=args.seed)
    passed_over = sum(source.passed_over.values())
    if passed_over > args.max_passed_over * (passed_over + len(source)):
        raise UserError(
            f"{args.src} holds {len(source)} images of the set and more else "
            f"({say_passed_over(source.passed_over)}): give the folder of the images alone, or "
            "raise --max-passed-over to go on without the others"
        )
    return source


def _run(args: argparse.Namespace, path: Path, opened: Callable[[], Source]) -> int:
    """This rank's part of a preparation of the source at `path`, which the first has `opened`."""
    options = {field.name for field in fields(Settings)} & vars(args).keys()
    settings = Settings(**{name: getattr(args, name) for name in options})
    formats, workers = FORMATS[args.format], args.workers or _cores()
    ranks = {"workers": workers, "world_size": _world_size()}
    if _rank():
        help_prepare(path, Path(args.out), formats, settings, rank=_rank(), **ranks)
        return 0
    source = opened()
    try:
        if is_remote(args.out):
            summary = prepare_and_upload(source, args.out, formats, settings, workers=workers)
        else:
            summary = prepare(source, Path(args.out), formats, settings, **ranks)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    images = " and ".join(f"{n} {split}" for split, n in summary["images"].items())
    shape = f"{settings.size}x{settings.size}x{source.channels} " if settings.size else ""
    aside = f"; {summary['errors']} set aside, see errors.parquet" if summary["errors"] else ""
    count = len(source.classes)
    classes = "1 class" if count == 1 else f"{count} classes"
    for form in formats:
        print(
            f"{args.out.rstrip('/')}/{form}: {images} images, {classes}, "
            f"{shape}{settings.encode}{aside}"
        )
    for line in _remarks(summary):
        print(line)
    return 0


def _remarks(summary: dict[str, Any]) -> Iterator[str]:
    """What of a set a user may not expect, a line each."""
    if summary["passed_over"]:
        yield say_passed_over(summary["passed_over"])
    yield from summary["notes"]
    counts = summary["images_per_class"]["train"]
    if empty := [name for name, count in zip(summary["classes"], counts, strict=True) if not count]:
        yield f"classes without an image in train: {listed(empty)}"


def parse(argv: list[str], *, world_size: int | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        world_size: ranks that will run it; None: those that do.

    Raises:
        UserError: a number in it is out of range, or it is none for so many ranks.
    """
    args = parser().parse_args(argv)
    if "size" in args and (args.encode == "keep") != (args.size is None):
        if args.size is None:
            raise UserError("--size is missing: give the side of the images in pixels, such as 64")
        raise UserError("--encode keep stores the files as they are: leave out --size")
    for name, (is_sound, wanted) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not is_sound(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {wanted}")
    if "seed" in args and is_remote(args.out) and (world_size or _world_size()) > 1:
        raise UserError(
            f"{args.out} is in an object store, which one rank alone can write to: leave out "
            "--nodes and --tasks-per-node, or give a folder that all nodes share"
        )
    return args


def run(argv: list[str]) -> int | None:
    """Runs a command, and returns its exit code."""
    args = parse(argv)
    return args.run(args)
