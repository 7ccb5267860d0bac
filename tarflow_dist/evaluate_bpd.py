"""Measures a model's likelihood on held-out images, on any number of ranks.

    python -m tarflow_dist.evaluate_bpd --model MODEL --data SHARDS

Prints the loss in nats a dimension, and for a model trained with uniform noise the bits per
dimension that likelihood papers compare.
"""

import argparse
from pathlib import Path

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.models import hub
from tarflow_dist.options import MODEL_HELP, command_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises:
    UserError: a number out of range, or no such model.
    """
    parser = command_parser("evaluate_bpd", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help=MODEL_HELP)
    add("--data", required=True, help="SHARDS folder made by data_prep, or its s3:// address")
    add("--split", default="val", choices=("train", "val"), help="default val")
    add("--draws", type=int, default=1, help="of the noise, to average over; default 1")
    add("--seed", type=int, default=0, help="of the noise; default 0")
    add("--batch-size", type=int, default=100, help="default 100")
    args = parser.parse_args(argv)
    if args.draws < 1 or args.batch_size < 1:
        raise UserError("--draws and --batch-size must be at least 1")
    hub.check(args.model)
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)

    from tarflow_dist import distributed
    from tarflow_dist.data.loader import eval_batches
    from tarflow_dist.data.shards import open_shards
    from tarflow_dist.evaluation.image_sets import check_image_shape
    from tarflow_dist.flow.bits_per_dim import bits_per_dim, loss_of
    from tarflow_dist.models.likelihood import mean_log_prob
    from tarflow_dist.models.tarflow import TarFlow

    device = distributed.init()
    # a bf16 model's likelihood would be off in the third digit
    flow = TarFlow.from_pretrained(hub.find_on_all_ranks(args.model).folder).float().to(device)
    shards = open_shards(args.data, args.split)
    check_image_shape(args.data, shards.image_shape, flow.image_shape)
    shards.check_classes(flow.num_classes)
    batches = eval_batches(
        shards,
        batch_size=args.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=0,
    )
    log_prob = mean_log_prob(flow, batches, draws=args.draws, seed=args.seed)
    if distributed.is_main():
        noise = "uniform noise"
        if flow.noise == "gaussian":
            levels = flow.sigma_range or (flow.sigma,)
            noise = f"Gaussian noise, std {' to '.join(map(str, levels))}"
        print(f"{len(shards)} images of {args.data} {args.split}, {args.draws} draws of {noise}")
        print(f"loss            {loss_of(log_prob):.5f} nats a dimension")
        if flow.noise == "uniform":
            print(f"bits per dim    {bits_per_dim(log_prob):.5f}")
    distributed.shutdown()


if __name__ == "__main__":
    run_command(main)
