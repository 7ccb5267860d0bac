"""Finds the fastest faithful way to invert each block of a model, on the device at hand.

    python -m tarflow_dist.calibrate MODEL --guidance 1.5 --annealed

Writes sampling.json beside the weights. `TarFlow.sample` and `sample_fid` follow it on this kind of
device, for this guidance, at these batch sizes and below; everything else is drawn sequentially.
A faster way is taken only if it gives the images of the sequential one: no uint8 value differs by
more than 1, and 99.9 % are equal.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.sample import add_guidance_arguments, guidance_of, load

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tarflow_dist.flow.block import FlowBlock
    from tarflow_dist.flow.guidance import Guidance
    from tarflow_dist.flow.inverse import Solver
    from tarflow_dist.policy import Calibration
    from tarflow_dist.pretrained import TarFlow

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
FIRST_WINDOW = 16
LARGER_WINDOWS = (32, 64, 128, 256)
SMALLER_WINDOWS = (8, 4)
WORTHWHILE = 0.8
"""Windows must take at most this share of the sequential time: noise shall not choose them."""
SHARE_EQUAL = 0.999
REPEATS = 3


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tarflow_dist.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of model.safetensors and config.json")
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16")
    add("--images", type=int, default=24, help="drawn to compare with sequential ones; default 24")
    add("--seed", type=int, default=0, help="of the samples that are drawn to measure")
    add_guidance_arguments(parser)
    args = parser.parse_args(argv)
    if min(args.batch_sizes) < 1 or args.images < 1:
        raise UserError("--batch-sizes and --images must be 1 or more")
    flow = load(args.model, args.device)
    assert flow.policy is not None
    guidance = guidance_of(args, flow)
    exact = draw(flow, guidance, None, images=args.images, seed=args.seed)
    tolerance = find_tolerance(flow, guidance, exact, seed=args.seed)
    for batch in sorted(set(args.batch_sizes)):
        found = calibrate(flow, batch, guidance, tolerance, exact, seed=args.seed)
        flow.policy = flow.policy.with_calibration(found)
        flow.policy.write(args.model)  # at once: what is measured survives an interruption
        m = found.measured
        print(
            f"batch {batch}: {flow.sampler(batch, guidance)}\n"
            f"  {m['seconds']:.3g} s, sequential {m['sequential_seconds']:.3g} s; "
            f"{m['share_equal']:.3%} of the uint8 values are equal, the largest difference is "
            f"{m['largest_difference']:.0f}",
            flush=True,
        )


def find_tolerance(
    flow: "TarFlow", guidance: "Guidance", exact: "Tensor", *, seed: int
) -> float | None:
    """The coarsest of `TOLERANCES` at which all blocks in windows give the sequential images; None
    if there is none."""
    from tarflow_dist.flow.inverse import Solver
    from tarflow_dist.telemetry.progress import Progress

    with Progress("tolerance", len(TOLERANCES), unit="try") as progress:
        for tolerance in TOLERANCES:
            solvers = [Solver(FIRST_WINDOW, tolerance)] * len(flow.blocks)
            share_equal, largest = compare(
                draw(flow, guidance, solvers, images=len(exact), seed=seed), exact
            )
            progress.update(1)
            if share_equal >= SHARE_EQUAL and largest <= 1:
                return tolerance
    return None


def calibrate(
    flow: "TarFlow",
    batch: int,
    guidance: "Guidance",
    tolerance: float | None,
    exact: "Tensor",
    *,
    seed: int,
) -> "Calibration":
    """The fastest solver of each block for `batch` samples, proved on whole images in the end."""
    from tarflow_dist.flow.block import FlowBlock
    from tarflow_dist.flow.inverse import SEQUENTIAL
    from tarflow_dist.policy import Calibration, device_name, dtype_name
    from tarflow_dist.telemetry.progress import Progress

    z, y = inputs(flow, batch, seed=seed)
    if flow.device.type == "cuda":
        flow.decode(z, y, **guidance.arguments())  # warms up
    latents = [z * flow.var.to(z.dtype).sqrt()]
    flow.decode(z, y, **guidance.arguments(), on_block=latents.append)
    guidances = guidance.per_block(len(flow.blocks))
    sequential = [SEQUENTIAL] * len(flow.blocks)
    solvers = list(sequential)
    if tolerance is not None:
        with Progress(f"batch {batch}", len(flow.blocks), unit="block") as progress:
            for t, block in enumerate(flow.blocks):
                assert isinstance(block, FlowBlock)
                latent = latents[len(flow.blocks) - 1 - t]
                solvers[t] = fastest_solver(block, latent, y, guidances[t], tolerance)
                progress.update(1)

    share_equal, largest = compare(
        draw(flow, guidance, solvers, images=len(exact), seed=seed), exact
    )
    times: tuple[list[float], ...] = ([], [])
    for _ in range(REPEATS):  # in turn, so that both meet the same machine
        for way, took in zip((solvers, sequential), times, strict=True):
            decode = partial(flow.decode, z, y, **guidance.arguments(), solvers=way)
            took.append(timed(decode, flow.device))
    seconds, sequential_seconds = map(median, times)
    faithful = share_equal >= SHARE_EQUAL and largest <= 1
    if not (faithful and seconds < WORTHWHILE * sequential_seconds):
        solvers, share_equal, largest, seconds = sequential, 1.0, 0.0, sequential_seconds
    return Calibration(
        device=device_name(flow.device),
        dtype=dtype_name(next(flow.parameters()).dtype),
        batch=batch,
        guidance=guidance,
        solvers=tuple(solvers),
        measured={
            "seconds": seconds,
            "sequential_seconds": sequential_seconds,
            "share_equal": share_equal,
            "largest_difference": largest,
        },
    )


def fastest_solver(
    block: "FlowBlock", z: "Tensor", y: "Tensor | None", guidance: "Guidance", tolerance: float
) -> "Solver":
    """Sequential, or the best window that the search finds, with the best start for it."""
    from tarflow_dist.flow.inverse import SEQUENTIAL, Solver, invert_block

    def seconds(solver: Solver) -> float:
        return timed(lambda: invert_block(block, z, y, guidance, solver), z.device)

    times = {SEQUENTIAL: WORTHWHILE * seconds(SEQUENTIAL)}

    def climb(solvers: Iterable[Solver]) -> None:
        """Tries one after another until one is slower than that before it."""
        before = float("inf")
        for solver in solvers:
            times[solver] = seconds(solver)
            if times[solver] > before:
                return
            before = times[solver]

    largest = z.shape[1] - 1
    for sizes in (LARGER_WINDOWS, SMALLER_WINDOWS):
        climb(Solver(w, tolerance) for w in (FIRST_WINDOW, *sizes) if w <= largest)
    best = min(times, key=times.__getitem__)
    if best.window > 1:
        for start in ("zero", "previous"):
            other = Solver(best.window, tolerance, start)
            times[other] = seconds(other)
    return min(times, key=times.__getitem__)


def draw(
    flow: "TarFlow",
    guidance: "Guidance",
    solvers: Sequence["Solver"] | None,
    *,
    images: int,
    seed: int,
) -> "Tensor":
    """`images` images by `solvers`, or sequentially, without denoising: uint8 (B, C, H, W)."""
    from tarflow_dist.flow.inverse import SEQUENTIAL
    from tarflow_dist.flow.noise import to_pixels

    z, y = inputs(flow, images, seed=seed)
    solvers = solvers or [SEQUENTIAL] * len(flow.blocks)
    return to_pixels(flow.decode(z, y, **guidance.arguments(), solvers=solvers), flow.noise)


def compare(images: "Tensor", exact: "Tensor") -> tuple[float, float]:
    """The share of uint8 values that are equal, and the largest difference."""
    difference = (images.int() - exact.int()).abs()
    return float((difference == 0).double().mean()), float(difference.max())


def inputs(flow: "TarFlow", batch: int, *, seed: int) -> tuple["Tensor", "Tensor | None"]:
    """Latents (B, N, D) and labels (B,) that go round the classes."""
    import torch

    index = torch.arange(batch, device=flow.device)
    y = index * 7 % flow.num_classes if flow.num_classes else None
    return flow.noise_of(index, seed=seed), y


def timed(work: Callable[[], object], device: "torch.device") -> float:
    """Seconds; of the processor where one thread does it all, which a busy machine doesn't blur."""
    import torch

    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


if __name__ == "__main__":
    run_command(main)
