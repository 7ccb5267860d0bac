"""Says what a run would cost, before it starts, from its config alone.

    python -m tarflow_dist.plan CONFIG [key=value …] --nodes 8 --gpus-per-node 8 --gpu h100

Exit code 1 if the run can't fit into the cards' memory, 2 for a mistake in the config.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tarflow_dist import config_file as configs
from tarflow_dist.config import Config
from tarflow_dist.cost.cards import CARDS, card
from tarflow_dist.cost.estimate import HEADROOM, Estimate, Layout, does_not_fit, estimate
from tarflow_dist.cost.network import NODES, NetworkEstimate, network, network_estimate
from tarflow_dist.errors import UserError, run_command
from tarflow_dist.options import command_parser

EXIT_DOES_NOT_FIT = 1
GIB = 1 << 30


def main(argv: list[str]) -> int:
    parser = command_parser("plan", __doc__)
    add = parser.add_argument
    add("config", type=Path, help="a YAML file, or a recipe's name, such as in256")
    add("overrides", nargs="*", metavar="key=value", help="changes to the config")
    add("--nodes", type=int, default=1, help="default 1")
    add("--gpus-per-node", type=int, default=8, help="default 8")
    add("--gpu", default="h100", help=f"{', '.join(CARDS)}; default h100")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="of each GPU, for a part of one, or for a card that is not among those, with --gpu "
        "for one of its speed; default the card's",
    )
    add("--mfu", type=float, default=0.4, help="model FLOPs utilisation, 0 to 1 ; default 0.4")
    add(
        "--network",
        help="between the nodes: GB/s that a node sends, such as 45, or its cards and their Gb/s, "
        "such as 2x200; says what a step waits for",
    )
    add("--json", action="store_true", help="print everything as JSON, in bytes and operations")
    args = parser.parse_intermixed_args(argv)
    if args.nodes < 1 or args.gpus_per_node < 1:
        raise UserError("--nodes and --gpus-per-node must be at least 1")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu is {args.mfu}, but must be above 0 and at most 1")

    gpu = card(args.gpu)
    if args.memory is not None:
        if not 0 < args.memory < math.inf:
            raise UserError(f"--memory is {args.memory}, but must be a number of GiB above 0")
        gpu = replace(gpu, memory=int(args.memory * GIB))

    config = configs.load(args.config, args.overrides)
    gpus = args.nodes * args.gpus_per_node
    result = estimate(config, gpu, gpus, mfu=args.mfu)
    told: NetworkEstimate | None = None
    if args.network is not None:
        told = network_estimate(
            config,
            gpu,
            network(args.network),
            nodes=args.nodes,
            gpus_per_node=args.gpus_per_node,
            mfu=args.mfu,
        )
    if args.json:
        print(json.dumps(asdict(result) | {"network": told and asdict(told)}, indent=1))
    else:
        print(f"{args.config} on {gpus} x {args.gpu} ({args.nodes} nodes), MFU {args.mfu:g}\n")
        print("\n".join(_lines(result, config, gpu.memory)))
        if told is not None:
            print("\n" + "\n".join(_network_lines(told, config)))
    if result.chosen.fits:
        return 0
    print(f"warning: {does_not_fit(result, args.gpu)}", file=sys.stderr)
    return EXIT_DOES_NOT_FIT


def _lines(result: Estimate, config: Config, card_memory: int) -> Iterator[str]:
    train, plain, again = config.train, result.plain, result.checkpointed
    sampling = result.sampling
    every = train.activation_checkpointing or 1
    recompute = "every layer" if every == 1 else f"1 layer in {every}"
    source = "" if result.image_bytes_measured else ", if stored raw"
    batch = f"{train.batch_size} images, {result.micro_batch} a GPU and pass"
    steps = sampling.denoising_steps
    score_steps = f", {steps} score steps a sample" if steps > 1 else ""
    rows = {
        "parameters": f"{result.parameters / 1e6:,.1f} M",
        "batch": f"{batch}, {result.passes} passes a step" if result.passes > 1 else batch,
        "FLOPs an image": f"forward {_si(result.forward_flops)}, training "
        f"{_si(result.training_flops)}, recomputing {recompute} {_si(again.flops)}",
        "images/s": f"{plain.images_per_second:,.0f}; recomputing {again.images_per_second:,.0f}",
        "time": f"{_time(plain.days)} for {train.images:,} images; recomputing {_time(again.days)}",
        "shards read": f"{_si(plain.read_per_second)}B/s{source}",
        "checkpoint": f"{_si(result.checkpoint_bytes)}B; {config.checkpoint.keep} are kept",
        f"{sampling.count // 1000}k guided": f"{_si(sampling.count * sampling.flops)}FLOP, "
        f"{_si(sampling.count * sampling.cache_bytes)}B of keys and values, sequentially: at least "
        f"{sampling.gpu_hours:,.1f} GPU hours{score_steps}",
    }
    yield from (f"{name:<16}{text}" for name, text in rows.items())
    yield ""
    room = f"{card_memory / GIB:.4g} less {HEADROOM:.0%} that CUDA and NCCL need"
    yield f"GiB a GPU, of {room}; * is the config's choice"
    yield from _table([HEADS, *map(_cells, result.layouts)])
    if train.offload:
        yield f"offload: {result.chosen.memory.host / GIB:.1f} GiB of host memory a GPU"


def _network_lines(told: NetworkEstimate, config: Config) -> Iterator[str]:
    between = told.network
    rows = {"network": f"{between.name}: {_si(between.bandwidth)}B/s a node", **told.in_words()}
    yield from (f"{name:<16}{text}" for name, text in rows.items())
    yield ""
    train = config.train
    yield f"ZeRO {train.zero_stage}, gradients sent in {train.reduce_precision}, by nodes; seconds"
    head = ("nodes", "GPUs", "images a GPU", "computing", "sending", "waited for", "share")
    yield from _table(
        [
            (*head, "images/s", "days"),
            *(
                (
                    *(str(step.nodes), str(step.gpus), str(train.batch_size // step.gpus)),
                    *(f"{step.compute:.3f}", f"{step.communication:.3f}", f"{step.waited:.3f}"),
                    *(f"{step.share:.1%}", f"{step.images_per_second:,.0f}", f"{step.days:,.1f}"),
                )
                for step in told.scaling
            ),
        ]
    )
    if left_out := sorted({*NODES} - {step.nodes for step in told.scaling}):
        nodes = ", ".join(map(str, left_out))
        yield f"not on {nodes} nodes: train.batch_size {train.batch_size} can't be cut over them"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


SIZES = ("weights", "masters", "optimiser", "gradients", "buffers", "activations", "peak")
HEADS = ("", "ZeRO", "recompute", *SIZES, "fits", "largest micro-batch")


def _cells(layout: Layout) -> tuple[str, ...]:
    """A row below HEADS."""
    every = layout.checkpoint_every
    return (
        "*" if layout.chosen else "",
        str(layout.stage),
        {0: "none", 1: "all"}.get(every, f"1 in {every}"),
        *(f"{getattr(layout.memory, size) / GIB:.2f}" for size in SIZES),
        "yes" if layout.fits else "no",
        str(layout.largest_micro_batch or "none"),
    )


def _time(days: float) -> str:
    """In the unit that it has a few of."""
    for unit, size in (("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if days >= size:
            return f"{days / size:,.1f} {unit}"
    return f"{days * 86_400:,.0f} seconds"


def _si(value: float) -> str:
    """1.23e12 → "1.23 T"."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


if __name__ == "__main__":
    run_command(main)
