"""`python -m data_prep {digits,folder} …`: writes OUT/mds/ and OUT/wds/, each a whole set."""

import argparse
from pathlib import Path

from data_prep.images import CROPS, ENCODINGS
from data_prep.pipeline import prepare
from data_prep.records import Settings
from data_prep.sources import DIGITS_SIZE, Digits, Folder, Source
from tarflow_dist.errors import UserError, run_command

FORMATS = {"mds": ["mds"], "wds": ["wds"], "both": ["mds", "wds"]}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Write images as shards: OUT/mds/ (MosaicML streaming) and OUT/wds/ "
        "(WebDataset tar), each with train/, val/, manifest.parquet, summary.json, errors.parquet.",
    )
    commands = top.add_subparsers(dest="command", required=True)

    digits = commands.add_parser("digits", help="scikit-learn's handwritten digits, 8x8, built in")
    digits.set_defaults(run=run_digits, format="both")

    folder = commands.add_parser(
        "folder",
        help="a folder of class folders",
        description="SRC/CLASS/…/image, or SRC/{train,val}/CLASS/…/image. Labels are the classes' "
        "positions in sorted order; images come out in RGB.",
    )
    folder.set_defaults(run=run_folder, format="mds")
    folder.add_argument("src", type=Path, help="the folder of class folders")
    folder.add_argument("--size", type=int, required=True, help="side of the square images")
    folder.add_argument(
        "--crop",
        choices=CROPS,
        default="adm",
        help="resize and centre crop as ADM does (default), or as TarFlow does",
    )
    folder.add_argument(
        "--encoding",
        choices=ENCODINGS,
        default="png",
        help="png is lossless (default); jpeg has quality 95, 4:4:4",
    )
    folder.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="share of each class held out for val, at least one image, where SRC has no "
        "train/ and val/ (default %(default)s)",
    )
    folder.add_argument(
        "--max-errors",
        type=float,
        default=0.01,
        help="stop when more than this share of the images, and more than 10, can't be read "
        "(default %(default)s)",
    )

    for command in (digits, folder):
        command.add_argument("out", type=Path, help="where the sets are written")
        command.add_argument("--format", choices=FORMATS, help="(default %(default)s)")
        command.add_argument("--seed", type=int, default=0, help="of split and order (default 0)")
    return top


def run_digits(args: argparse.Namespace) -> None:
    _write(Digits(seed=args.seed), args, Settings(size=DIGITS_SIZE, seed=args.seed))


def run_folder(args: argparse.Namespace) -> None:
    settings = Settings(
        size=args.size,
        crop=args.crop,
        encoding=args.encoding,
        seed=args.seed,
        max_errors=args.max_errors,
    )
    if args.size <= 0:
        raise UserError(f"--size is {args.size}: give the side of the images in pixels, such as 64")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val-fraction is {args.val_fraction}: give a share such as 0.1")
    if not 0 <= args.max_errors <= 1:
        raise UserError(f"--max-errors is {args.max_errors}: give a share such as 0.01")
    _write(Folder(args.src, val_fraction=args.val_fraction, seed=args.seed), args, settings)


def _write(source: Source, args: argparse.Namespace, settings: Settings) -> None:
    formats = FORMATS[args.format]
    summary = prepare(source, args.out, formats, settings)
    images = " and ".join(f"{n} {split}" for split, n in summary["images"].items())
    shape = f"{settings.size}x{settings.size}x{source.channels}"
    aside = f"; {summary['errors']} set aside, see errors.parquet" if summary["errors"] else ""
    for form in formats:
        print(
            f"{args.out / form}: {images} images, {len(source.classes)} classes, {shape} "
            f"{settings.encoding}{aside}"
        )


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}: give a number from 0 to {2**32 - 1}")
    args.run(args)


if __name__ == "__main__":
    run_command(main)
