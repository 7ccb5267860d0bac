"""How the sequential sampler's time grows with the number of patches and the batch, beside the
published sampler's and the least that the machine could take.

    python -m benchmarks.sampling_growth [--published PATH] [--device cuda]

PATH is a checkout of apple/ml-tarflow. One flow block of each size is inverted with guidance 1 and
random weights, on which an exact inverse doesn't depend. The floor has two parts: the operations of
the two passes at the rate of a large matrix product, and the keys and values that are read, each
time a patch is added, at the rate at which the machine adds up a large tensor.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampling import load_peer
from benchmarks.side_by_side import alternate, ratio, timed
from tarflow_dist import TarFlow
from tarflow_dist.flow.flops import FlowCost

SMALL = {"patch_size": 2, "width": 256, "layers_per_block": 4}
SIZES = [
    {"image_size": 16, **SMALL},
    {"image_size": 32, **SMALL},
    {"image_size": 64, **SMALL},
    {"image_size": 64, "patch_size": 4, "width": 384, "layers_per_block": 6},
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    flops, bandwidth = machine(device)
    print(f"{device}, {torch.get_num_threads()} threads, {flops / 1e9:.0f} GFLOP/s in a matrix")
    print(f"product of 2048 x 2048 values, {bandwidth / 1e9:.0f} GB/s read; seconds a block\n")
    print("| N | width | layers | batch | ours | published | published / ours |", end="")
    print(" operations | keys and values | ours / floor |\n" + "|---" * 10 + "|")
    for size in SIZES:
        for batch in args.batch_sizes:
            print(row(size, batch, args, flops, bandwidth), flush=True)


@torch.no_grad()
def row(
    size: dict[str, int], batch: int, args: argparse.Namespace, flops: float, bandwidth: float
) -> str:
    torch.manual_seed(0)
    flow = TarFlow(**size, num_blocks=1, num_classes=10, sigma=0.1).requires_grad_(False)
    torch.nn.init.normal_(flow.blocks[0].proj_out.weight, std=0.02)
    flow.to(args.device)
    z, y = flow.noise_of(torch.arange(batch), seed=1), torch.arange(batch, device=flow.device) % 10
    ways: dict[str, Callable[[], Tensor]] = {"ours": partial(flow.decode, z, y, guidance=1.0)}
    if args.published:
        published: Any = load_peer(args.published, "transformer_flow", flow)
        ways["published"] = lambda: published.reverse(z.clone(), y, guidance=1.0)
        gap = float((ways["ours"]() - ways["published"]()).abs().max())
        assert gap < 1e-3, f"they differ by {gap}"
    runs = {name: lambda way=way: timed(way, flow.device) for name, way in ways.items()}
    times = alternate(runs, rounds=args.rounds)
    ours = median(times["ours"])
    counts = FlowCost(flow.config)
    layers, tokens = counts.layers[0], counts.num_patches
    computing = 2 * batch * counts.forward_flops / flops
    # two passes; a key and a value of 4 bytes a number, for each pair of patches
    reading = 2 * batch * layers * 2 * 4 * counts.width * tokens * (tokens + 1) / 2 / bandwidth
    peer = ["", ""]
    if args.published:
        peer = [
            f"{median(times['published']):.2f}",
            f"{ratio(times['published'], times['ours']):.1f}",
        ]
    cells = [tokens, counts.width, layers, batch, f"{ours:.2f}", *peer]
    cells += [f"{computing:.2f}", f"{reading:.2f}", f"{ours / (computing + reading):.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


def machine(device: torch.device) -> tuple[float, float]:
    """Operations a second in a large fp32 matrix product, and bytes a second read; best of ten."""
    a = torch.randn(2048, 2048, device=device)
    much = torch.randn(2**29, device=device)
    product = min(timed(lambda: a @ a, device) for _ in range(10))
    reading = min(timed(much.sum, device) for _ in range(10))
    return 2 * 2048**3 / product, 4 * 2**29 / reading


if __name__ == "__main__":
    main()
