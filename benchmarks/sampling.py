"""How long guided sampling takes, against the published samplers: same weights, same noise.

    python -m benchmarks.sampling MODEL --published PATH --gs-jacobi PATH [--batch-sizes 1 4 16]

PATH are checkouts of apple/ml-tarflow, or apple/ml-itarflow for an iTARFlow, and
encoreus/GS-Jacobi_for_TarFlow; what is absent is left out. An iTARFlow's score step is timed
too. The ways take turns within a round; ratios are medians of the rounds' ratios. MODEL should be
calibrated before, for the same guidance and batch sizes.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import alternate, ratio
from tarflow_dist import TarFlow
from tarflow_dist.calibrate import timed
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import SEQUENTIAL
from tarflow_dist.flow.noise import to_pixels

# (segments of each block, 0 for one patch at a time; sweeps a segment; stopping bound)
GS_JACOBI = [(0, 1, 0.0), (1, 256, 1e-6), (8, 256, 1e-6), (16, 256, 1e-6), (8, 256, 1e-4)]
# whose times are divided by each way's
PEERS = ("sequential", "published")
SCORE_STEPS = ("score step", "score step, published")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--published", type=Path)
    add("--gs-jacobi", type=Path)
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    add("--guidance", type=float, default=1.0)
    add("--rounds", type=int, default=3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    flow = TarFlow.from_pretrained(args.model).requires_grad_(False).to(args.device)
    with torch.no_grad():
        for batch in args.batch_sizes:
            compare(flow, batch, args)


def compare(flow: TarFlow, batch: int, args: argparse.Namespace) -> None:
    index = torch.arange(batch, device=flow.device)
    z, y = flow.noise_of(index, seed=1), index * 7 % flow.num_classes
    # iTARFlow's published rule is another
    guidance = Guidance(args.guidance, rule="linear" if flow.sigma_range is None else "scale")
    sequential = [SEQUENTIAL] * len(flow.blocks)
    ways: dict[str, Callable[[], Tensor]] = {
        "sequential": lambda: flow.decode(z, y, **guidance.arguments(), solvers=sequential)
    }
    if flow.sampler(batch, guidance) != "sequential":
        ways["calibrated"] = lambda: flow.decode(z, y, **guidance.arguments())
    if args.published:
        published = load_peer(args.published, "transformer_flow", flow)
        more = (
            {} if flow.sigma_range is None else {"t": torch.full((batch, 1), flow.sigma_range[1])}
        )
        ways["published"] = lambda: published.reverse(z.clone(), y, guidance=args.guidance, **more)
    if args.gs_jacobi:
        peer = load_peer(args.gs_jacobi, "GS_Jacobi_sampling", flow)
        for segments, sweeps, bound in GS_JACOBI:
            blocks = len(flow.blocks)
            ways[f"GS-Jacobi, {segments} segments, bound {bound:g}"] = partial(
                lambda **strategy: peer.reverse(z.clone(), y, guidance=args.guidance, **strategy),
                num_GS_list=[segments] * blocks,
                max_jacobi_list=[sweeps] * blocks,
                ebound=bound,
            )
    images: dict[str, Tensor] = {}
    runs = {name: partial(clock, name, way, images, flow.device) for name, way in ways.items()}
    nothing = torch.zeros(2 * batch, *flow.image_shape, device=flow.device)
    level = None if flow.sigma_range is None else flow.sigma_range[1]
    levels = None if level is None else torch.full((2 * batch,), level, device=flow.device)
    once = partial(timed, device=flow.device, repeats=1)
    runs["two forward passes"] = lambda: once(lambda: flow(nothing, sigma=levels))
    if level is not None:
        x, sigma = nothing[:batch], level
        runs["score step"] = lambda: once(lambda: flow.denoise(x, y, sigma))
        if args.published:
            step = partial(published_score_step, published, x, y, sigma)
            runs["score step, published"] = lambda: once(step)
    times = alternate(runs, rounds=args.rounds)

    print(f"\nbatch {batch}, guidance {args.guidance}, {args.device}, N = {flow.num_patches}")
    print(f"{torch.get_num_threads()} threads; calibrated: {flow.sampler(batch, guidance)}")
    print("| way | seconds | sequential / it | published / it | largest error | uint8 equal |")
    print("|---|---|---|---|---|---|")
    exact = images["sequential"]
    for name, took in times.items():
        peers = SCORE_STEPS if name in SCORE_STEPS else PEERS
        against = [f"{ratio(times[peer], took):.2f}" if peer in times else "" for peer in peers]
        error = ["", ""]
        if name in images:
            equal = to_pixels(images[name], flow.noise) == to_pixels(exact, flow.noise)
            error = [f"{(images[name] - exact).abs().max():.1e}", f"{equal.double().mean():.3%}"]
        print(f"| {' | '.join([name, f'{median(took):.3f}', *against, *error])} |", flush=True)


def clock(
    name: str, way: Callable[[], Tensor], images: dict[str, Tensor], device: torch.device
) -> float:
    """The seconds that `way` takes; what it draws is kept in `images`."""

    def draw() -> None:
        images[name] = way()

    return timed(draw, device, repeats=1)


def published_score_step(peer: Any, x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """As apple/ml-itarflow's evaluation takes it."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        z, _, logdets, _ = peer(x, y, torch.full((len(x), 1), sigma, device=x.device))
        loss = peer.get_loss(z, logdets, None, torch.ones(len(x), device=x.device))
        (gradient,) = torch.autograd.grad(loss, x)
    return x.detach() - sigma**2 * x.numel() * gradient


def load_peer(folder: Path, module: str, flow: TarFlow) -> Any:
    """The published model of flow's size, with its weights."""
    sys.path.insert(0, str(folder))
    config = flow.config
    common = {
        "in_channels": config.in_channels,
        "img_size": config.image_size,
        "num_blocks": config.num_blocks,
        "num_classes": config.num_classes,
    }
    if flow.sigma_range is None:
        sizes = {
            "patch_size": config.patch_size,
            "channels": config.width,
            "layers_per_block": config.layers_per_block,
        }
    else:
        sizes = {
            "patch_sizes": [config.patch_size],
            "channels": [config.width],
            "layers_per_block": config.layers,
        }
    peer = __import__(module).Model(**common, **sizes)
    peer.load_state_dict(flow.state_dict(), strict=False)  # but for its attention masks
    return peer.requires_grad_(False).to(flow.device)


if __name__ == "__main__":
    main()
