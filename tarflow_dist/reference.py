"""Measures a data set once, for `sample_fid --reference OUT.npz`.

    python -m tarflow_dist.reference SHARDS OUT.npz --inception-weights WEIGHTS.pth
    torchrun --nproc-per-node 8 -m tarflow_dist.reference ...

Every image counts exactly once, as it is stored: no flips, no further crop. OUT.npz holds mean and
covariance under ADM's names (mu, sigma, mu_s, sigma_s) and the features of some images.
"""

from pathlib import Path

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.evaluation.features import EXTRACTORS, check_features
from tarflow_dist.options import check_writable, command_parser


def main(argv: list[str]) -> None:
    parser = command_parser("reference", __doc__)
    add = parser.add_argument
    add("shards", help="folder made by data_prep, or its s3:// address")
    add("out", type=Path, metavar="OUT.npz")
    add("--split", default="train", choices=("train", "val"), help="default train")
    add("--features", default="inception", choices=EXTRACTORS, help="default inception")
    add("--inception-weights", type=Path, help="FID's Inception v3, a .pth file")
    add(
        "--keep",
        type=int,
        default=10_000,
        help="images whose own features are kept, spread over the set, for precision, recall and "
        "the kernel distance; default 10000, as in ADM's files",
    )
    add("--batch-size", type=int, default=100, help="default 100")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.keep < 1:
        raise UserError("--batch-size and --keep must be at least 1")
    if args.out.suffix != ".npz":
        raise UserError(f"{args.out}: the name of the file to write ends in .npz")
    check_features([args.features], args.inception_weights)

    from dataclasses import replace

    from tarflow_dist import distributed
    from tarflow_dist.evaluation.features import make_extractor
    from tarflow_dist.evaluation.measure import measure_reference
    from tarflow_dist.evaluation.reference_set import open_shards_reference
    from tarflow_dist.telemetry.environment import describe_environment

    device = distributed.init()
    reference = open_shards_reference(args.shards, args.split, args.keep)
    assert reference.images is not None
    with distributed.together(f"{args.out} can't be written"):
        if distributed.is_main():
            args.out.parent.mkdir(parents=True, exist_ok=True)
            check_writable(args.out)
    shape = reference.images.image_shape
    extractor = make_extractor(args.features, shape, args.inception_weights, device)
    measured = measure_reference(reference, extractor, batch_size=args.batch_size, device=device)
    if distributed.is_main():
        about = {
            **measured.about,
            **reference.about,
            "image_shape": list(shape),
            "class_names": reference.class_names,
            "class_counts": reference.class_counts,
            "environment": describe_environment(),
        }
        replace(measured, about=about).save(args.out)
        print(
            f"{args.out}: {about['count']} images of {args.shards} {args.split}, "
            f"{extractor.dim} features of {extractor.name}"
        )
    distributed.shutdown()


if __name__ == "__main__":
    run_command(main)
