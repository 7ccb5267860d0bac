"""Finds the fastest faithful way to invert each block of a model, on the device at hand.

    python -m tarflow_dist.calibrate MODEL --guidance 1.5 --annealed

Writes sampling.json beside the weights. `TarFlow.sample` and `sample_fid` follow it on this kind of
device, for this guidance, at these batch sizes and below; everything else is drawn sequentially.
A faster way is taken only if it comes as close to the images of float32, drawn sequentially, as the
sequential way does in the model's own type: 0.1 % fewer uint8 values may be equal, and the largest
difference may be 1 more. For float32 that is 99.9 % equal, and none off by more than 1.
"""

import sys
import time
import timeit
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow_dist.errors import UserError, enough_memory, run_command
from tarflow_dist.models import hub
from tarflow_dist.models.folder import POLICY_FILE
from tarflow_dist.options import (
    MODEL_HELP,
    add_dtype_option,
    add_guidance_options,
    check_writable,
    command_parser,
    guidance_of,
    load_model,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tarflow_dist.flow.guidance import Guidance
    from tarflow_dist.flow.jacobi import Solver
    from tarflow_dist.models.sampling_policy import Calibration
    from tarflow_dist.models.tarflow import TarFlow

REPEATS = 4
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
WINDOWS = (4, 8, 16, 32, 64, 128, 256)
WORTHWHILE = 0.9
"""Windows must take less than this share of the sequential time: noise shall not choose them."""
FEWER_EQUAL = 0.001
FURTHER_OFF = 1


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
    check_writable(args.model / POLICY_FILE)

    from tarflow_dist.models.sampling_policy import read_policy

    flow = load_model(args.model, args.device, args.dtype, calibrated=False)
    assert flow.policy is not None
    try:
        flow.policy = read_policy(
            args.model, fingerprint=flow.policy.fingerprint, num_blocks=len(flow.blocks)
        )
    except UserError as error:
        print(f"starting anew: {error}", file=sys.stderr)
    guidance = guidance_of(flow, args.guidance, args)
    with enough_memory(f"{args.images} images at once", "lower --images"):
        measured = Calibrator(flow, guidance, images=args.images, seed=args.seed)
    for batch in sorted(set(args.batch_sizes)):
        with enough_memory(f"batches of {batch}", f"leave {batch} out of --batch-sizes"):
            found = measured.calibrate(batch)
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


class Calibrator:
    """Measures what a faster way takes, and what it gives.

    Args:
        images: drawn sequentially, with noise of `seed`, for others to be compared with.

    Attributes:
        exact: those images, drawn in at least float32: uint8 (B, C, H, W).
        closeness: how close (`compare`) the sequential way comes to them in the model's own type.

    Raises:
        UserError: they are not finite, and so no measure of others.
    """

    def __init__(self, flow: "TarFlow", guidance: "Guidance", *, images: int, seed: int):
        from tarflow_dist.flow.jacobi import SEQUENTIAL
        from tarflow_dist.flow.noise import to_pixels

        self._flow, self._guidance, self._seed = flow, guidance, seed
        self._sequential = [SEQUENTIAL] * len(flow.blocks)
        own = self._decode(flow, images, self._sequential)
        exact = own
        if next(flow.parameters()).dtype != flow.dtype:
            exact = self._decode(deepcopy(flow).to(flow.dtype), images, self._sequential)
        if not (own.isfinite().all() and exact.isfinite().all()):
            raise UserError(
                "this model's samples are not all finite at this guidance: mend that first"
            )
        self.exact = to_pixels(exact, flow.noise)
        self.closeness = compare(to_pixels(own, flow.noise), self.exact)

    def calibrate(self, batch: int) -> "Calibration":
        """The fastest solver of each block for `batch` samples, proved on whole images."""
        from tarflow_dist.models.sampling_policy import Calibration, dtype_name, machine_name

        solvers, closeness = self.faithful(self._fastest(batch))
        decode = partial(self._decode, self._flow, batch)
        seconds = sequential_seconds = timed(partial(decode, self._sequential), self._flow.device)
        if solvers != self._sequential:
            seconds = timed(partial(decode, solvers), self._flow.device)
        if not seconds < WORTHWHILE * sequential_seconds:
            solvers, closeness, seconds = self._sequential, self.closeness, sequential_seconds
        share_equal, largest = closeness
        return Calibration(
            device=machine_name(self._flow.device),
            dtype=dtype_name(next(self._flow.parameters()).dtype),
            batch=batch,
            guidance=self._guidance,
            solvers=tuple(solvers),
            measured={
                "seconds": seconds,
                "sequential_seconds": sequential_seconds,
                "share_equal": share_equal,
                "largest_difference": largest,
            },
        )

    def faithful(self, solvers: list["Solver"]) -> tuple[list["Solver"], tuple[float, float]]:
        """`solvers` with the coarsest of `TOLERANCES` that comes as close as the sequential way,
        and how close that is (`compare`); all sequential if there is none."""
        from tarflow_dist.flow.noise import to_pixels

        share_of_sequential, largest_of_sequential = self.closeness
        for tolerance in TOLERANCES if solvers != self._sequential else ():
            tried = [s if s.window == 1 else replace(s, tolerance=tolerance) for s in solvers]
            x = self._decode(self._flow, len(self.exact), tried)
            share_equal, largest = compare(to_pixels(x, self._flow.noise), self.exact)
            if (
                share_equal >= share_of_sequential - FEWER_EQUAL
                and largest <= largest_of_sequential + FURTHER_OFF
            ):
                return tried, (share_equal, largest)
        return self._sequential, self.closeness

    def _fastest(self, batch: int) -> list["Solver"]:
        """For each block the window that takes least, if that is less than the sequential way
        takes; all windows have the coarsest tolerance."""
        from tarflow_dist.flow.block import FlowBlock
        from tarflow_dist.flow.inverse import invert_block
        from tarflow_dist.flow.jacobi import SEQUENTIAL, Solver
        from tarflow_dist.telemetry.progress import Progress

        flow, guidance = self._flow, self._guidance
        z, y = inputs(flow, batch, seed=self._seed)
        latents = [z * flow.var.to(z.dtype).sqrt()]
        flow.decode(z, y, **guidance.arguments(), solvers=self._sequential, on_block=latents.append)
        windows = [Solver(window, TOLERANCES[0]) for window in WINDOWS if window < z.shape[1]]
        solvers = []
        with Progress(f"batch {batch}", len(flow.blocks), unit="block") as progress:
            for block, latent, guided in zip(
                flow.blocks, latents[-2::-1], guidance.per_block(len(flow.blocks)), strict=True
            ):
                assert isinstance(block, FlowBlock)
                invert = partial(invert_block, block, latent, y, guided, graphed=flow.graphed)
                best, least = SEQUENTIAL, float("inf")
                for solver in windows:  # until one is slower than that before
                    seconds = timed(partial(invert, solver), flow.device, repeats=2)
                    if seconds > least:
                        break
                    best, least = solver, seconds
                sequential = timed(partial(invert, SEQUENTIAL), flow.device)
                solvers.append(best if least < WORTHWHILE * sequential else SEQUENTIAL)
                progress.update(1)
        return solvers

    def _decode(self, flow: "TarFlow", batch: int, solvers: list["Solver"]) -> "Tensor":
        z, y = inputs(flow, batch, seed=self._seed)
        return flow.decode(z, y, **self._guidance.arguments(), solvers=solvers)


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


def timed(work: Callable[[], object], device: "torch.device", repeats: int = REPEATS) -> float:
    """Seconds that `work` takes, the least of several: all else that goes on only adds to them, as
    does a GPU's first time, which records graphs."""
    import torch

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return min(timeit.repeat(work, timer=clock, number=1, repeat=repeats))


if __name__ == "__main__":
    run_command(main)
