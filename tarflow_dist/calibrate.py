"""Finds the fastest faithful way to invert each block of a model, on the device at hand.

    python -m tarflow_dist.calibrate MODEL --guidance 1.5 --annealed

Writes sampling.json beside the weights. `TarFlow.sample` and `sample_fid` follow it on this kind of
device, for this guidance, at these batch sizes and below; everything else is drawn sequentially.
A faster way is taken only if it comes as close to the images of float32, drawn sequentially, as the
sequential way does in the model's own type: 0.1 % fewer uint8 values may be equal, and the largest
difference may be 1 more. For float32 that is 99.9 % equal, and none off by more than 1.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tarflow_dist.errors import UserError, enough_memory, run_command
from tarflow_dist.models import hub
from tarflow_dist.options import (
    GUIDANCE,
    MODEL_HELP,
    add_dtype_option,
    add_guidance_options,
    command_parser,
    guidance_of,
    load_model,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tarflow_dist.flow.block import FlowBlock
    from tarflow_dist.flow.guidance import Guidance
    from tarflow_dist.flow.recordings import Recordings
    from tarflow_dist.flow.windows import Solver
    from tarflow_dist.models.sampling_policy import Calibration
    from tarflow_dist.models.tarflow import TarFlow

TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
WINDOWS = (4, 8, 16, 32, 64, 128, 256)
WORTHWHILE = 0.9
"""Windows must take less than this share of the sequential time: noise shall not choose them."""
HOPELESS = 1.5
"""Windows that took more than this many times the sequential time once are not measured again."""
FEWER_EQUAL = 0.001
FURTHER_OFF = 1
REPEATS = 3


def main(argv: list[str]) -> None:
    parser = command_parser("calibrate", __doc__)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16")
    add("--images", type=int, default=24, help="drawn to compare with sequential ones; default 24")
    add("--seed", type=int, default=0, help="of the samples that are drawn to measure; default 0")
    add("--device", help="default cuda if there is one, else cpu")
    add_dtype_option(add)
    add("--guidance", type=float, default=0.0, help="w; default 0: none")
    add_guidance_options(add)
    args = parser.parse_args(argv)
    if min(args.batch_sizes) < 1 or args.images < 1:
        raise UserError("--batch-sizes and --images must be 1 or more")
    args.model = hub.find(args.model).folder
    if not os.access(args.model, os.W_OK):
        raise UserError(f"{args.model}/sampling.json can't be written")

    from tarflow_dist.models.sampling_policy import read_policy

    flow = load_model(args.model, args.device, args.dtype, calibrated=False)
    assert flow.policy is not None
    try:
        flow.policy = read_policy(
            args.model, fingerprint=flow.policy.fingerprint, num_blocks=len(flow.blocks)
        )
    except UserError as error:
        print(f"starting anew: {error}", file=sys.stderr)
    guidance = guidance_of(flow, args.guidance, **{name: vars(args)[name] for name in GUIDANCE})
    with enough_memory(f"{args.images} images at once", "lower --images"):
        goal = Goal.of(flow, guidance, images=args.images, seed=args.seed)
    for batch in sorted(set(args.batch_sizes)):
        with enough_memory(f"batches of {batch}", f"leave {batch} out of --batch-sizes"):
            found = calibrate(flow, batch, guidance, goal, seed=args.seed)
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


def calibrate(
    flow: "TarFlow", batch: int, guidance: "Guidance", goal: "Goal", *, seed: int
) -> "Calibration":
    """The fastest solver of each block for `batch` samples, proved on whole images in the end."""
    from tarflow_dist.flow.windows import SEQUENTIAL
    from tarflow_dist.models.sampling_policy import Calibration, dtype_name, machine_name

    z, y = inputs(flow, batch, seed=seed)
    sequential = [SEQUENTIAL] * len(flow.blocks)

    def decode(solvers: Sequence["Solver"]) -> "Tensor":
        return flow.decode(z, y, **guidance.arguments(), solvers=solvers)

    solvers, closeness = faithful(flow, guidance, fastest_solvers(flow, z, y, guidance), goal, seed)
    seconds, sequential_seconds = race(
        [lambda: decode(solvers), lambda: decode(sequential)], flow.device
    )
    if not seconds < WORTHWHILE * sequential_seconds:
        solvers, closeness, seconds = sequential, goal.sequential, sequential_seconds
    share_equal, largest = closeness
    return Calibration(
        device=machine_name(flow.device),
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


def fastest_solvers(
    flow: "TarFlow", z: "Tensor", y: "Tensor | None", guidance: "Guidance"
) -> list["Solver"]:
    """For each block; all windows have the coarsest tolerance."""
    from tarflow_dist.flow.block import FlowBlock
    from tarflow_dist.telemetry.progress import Progress

    latents = [z * flow.var.to(z.dtype).sqrt()]
    flow.decode(z, y, **guidance.arguments(), on_block=latents.append)
    solvers = []
    with Progress(f"batch {len(z)}", len(flow.blocks), unit="block") as progress:
        for block, latent, guided in zip(
            flow.blocks, latents[-2::-1], guidance.per_block(len(flow.blocks)), strict=True
        ):
            assert isinstance(block, FlowBlock)
            solvers.append(fastest_solver(block, latent, y, guided, flow.recordings))
            progress.update(1)
    return solvers


def fastest_solver(
    block: "FlowBlock",
    z: "Tensor",
    y: "Tensor | None",
    guidance: "Guidance",
    recordings: "Recordings",
) -> "Solver":
    """The best window that a search finds, if it then beats the sequential way once more."""
    from tarflow_dist.flow.inverse import invert_block
    from tarflow_dist.flow.windows import SEQUENTIAL, Solver

    def inversion(solver: Solver) -> Callable[[], object]:
        return lambda: invert_block(block, z, y, guidance, solver, recordings=recordings)

    def seconds_of(solver: Solver) -> float:
        if z.device.type == "cuda":
            inversion(solver)()  # a first call loads kernels and records
        return timed(inversion(solver), z.device)

    sequential_once = seconds_of(SEQUENTIAL)
    best, before = SEQUENTIAL, float("inf")
    for window in (w for w in WINDOWS if w < z.shape[1]):  # until one is slower than that before
        solver = Solver(window, TOLERANCES[0])
        seconds = seconds_of(solver)
        if seconds > before:
            break
        best, before = solver, seconds
    if best == SEQUENTIAL or before > HOPELESS * sequential_once:
        return SEQUENTIAL
    seconds, sequential_seconds = race([inversion(best), inversion(SEQUENTIAL)], z.device)
    return best if seconds < WORTHWHILE * sequential_seconds else SEQUENTIAL


def faithful(
    flow: "TarFlow",
    guidance: "Guidance",
    solvers: list["Solver"],
    goal: "Goal",
    seed: int,
) -> tuple[list["Solver"], tuple[float, float]]:
    """`solvers` with the coarsest of `TOLERANCES` that comes as close to the goal as the sequential
    way, and how close that is (`compare`); all sequential if there is none."""
    from tarflow_dist.flow.windows import SEQUENTIAL

    share_of_sequential, largest_of_sequential = goal.sequential
    for tolerance in TOLERANCES if any(s != SEQUENTIAL for s in solvers) else ():
        tried = [s if s == SEQUENTIAL else replace(s, tolerance=tolerance) for s in solvers]
        images = draw(flow, guidance, tried, images=len(goal.exact), seed=seed)
        share_equal, largest = compare(images, goal.exact)
        if (
            share_equal >= share_of_sequential - FEWER_EQUAL
            and largest <= largest_of_sequential + FURTHER_OFF
        ):
            return tried, (share_equal, largest)
    return [SEQUENTIAL] * len(solvers), goal.sequential


@dataclass(frozen=True)
class Goal:
    """What a faster way must give.

    Attributes:
        exact: images drawn sequentially in at least float32, uint8 (B, C, H, W).
        sequential: how close (`compare`) the model comes sequentially in its own type.
    """

    exact: "Tensor"
    sequential: tuple[float, float]

    @classmethod
    def of(cls, flow: "TarFlow", guidance: "Guidance", *, images: int, seed: int) -> "Goal":
        from copy import deepcopy

        own = draw(flow, guidance, None, images=images, seed=seed)
        if next(flow.parameters()).dtype == flow.dtype:
            return cls(own, compare(own, own))
        exact = draw(deepcopy(flow).to(flow.dtype), guidance, None, images=images, seed=seed)
        return cls(exact, compare(own, exact))


def draw(
    flow: "TarFlow",
    guidance: "Guidance",
    solvers: Sequence["Solver"] | None,
    *,
    images: int,
    seed: int,
) -> "Tensor":
    """`images` images by `solvers`, or sequentially, without denoising: uint8 (B, C, H, W).

    Raises:
        UserError: the sequential ones are not finite, and so no measure of others.
    """
    from tarflow_dist.flow.noise import to_pixels
    from tarflow_dist.flow.windows import SEQUENTIAL

    z, y = inputs(flow, images, seed=seed)
    sequential = [SEQUENTIAL] * len(flow.blocks)
    x = flow.decode(z, y, **guidance.arguments(), solvers=solvers or sequential)
    if solvers is None and not x.isfinite().all():
        raise UserError("this model's samples are not all finite at this guidance: mend that first")
    return to_pixels(x, flow.noise)


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


def race(ways: Sequence[Callable[[], object]], device: "torch.device") -> list[float]:
    """Median seconds of each; they take turns, so that all meet the same machine."""
    rounds = [[timed(way, device) for way in ways] for _ in range(REPEATS)]
    return [median(took) for took in zip(*rounds, strict=True)]


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
