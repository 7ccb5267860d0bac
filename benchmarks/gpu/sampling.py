"""Guided sampling at the recipes' sizes, one flow block of each, beside the published sampler."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.models import RECIPES, Bench, attempt
from tarflow_dist import TarFlow
from tarflow_dist.calibrate import Calibrator
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import SEQUENTIAL

BATCHES = (1, 16, 64, 256)
GUIDANCE = Guidance(1.5, annealed=True)


def against_the_published(bench: Bench) -> Iterator[dict[str, Any]]:
    """Seconds of one flow block, bf16: recording included, replayed, and as it was published."""
    for recipe in RECIPES[:1] if bench.tiny else RECIPES:
        flow = bench.flow(recipe, blocks=1)
        for batch in (1, 2) if bench.tiny else BATCHES:
            key = f"{recipe}, batch {batch}"
            found = attempt(partial(sequential, bench, flow, batch))
            yield {key: found}
            if bench.published and isinstance(found, dict):
                found |= {"published": attempt(partial(published, bench, flow, batch))}
                if isinstance(found["published"], float):
                    found["published / ours"] = round(found["published"] / found["seconds"], 2)
                yield {key: found}
            bench.free()
        images = 4 if bench.tiny else 16
        made = attempt(partial(Calibrator, flow, GUIDANCE, images=images, seed=0))
        for batch in (1, 2) if bench.tiny else (1, 16):
            measured = isinstance(made, Calibrator)
            found = attempt(partial(windows, made, batch)) if measured else made
            yield {f"{recipe}, windows, batch {batch}": found}


def sequential(bench: Bench, flow: TarFlow, batch: int) -> dict[str, float]:
    index = torch.arange(batch, device=flow.device)
    z, y = flow.noise_of(index, seed=1), index * 7 % flow.num_classes

    def decode() -> None:
        flow.decode(z, y, **GUIDANCE.arguments(), solvers=[SEQUENTIAL])

    first, again = bench.seconds(decode), bench.median(decode)
    return {"first": round(first, 4), "seconds": round(again, 4), "peak_gib": bench.peak_gib()}


def windows(calibrator: Calibrator, batch: int) -> dict[str, Any]:
    """What `calibrate` finds for `batch` samples."""
    found = calibrator.calibrate(batch)
    return {"solver": str(found.solvers[0]), **found.measured}


def published(bench: Bench, flow: TarFlow, batch: int) -> float:
    """As its evaluate_fid.py: fp32 weights under bf16 autocast, inference mode."""
    sys.path.insert(0, str(bench.published))
    import transformer_flow  # type: ignore[import-not-found]

    config = flow.config
    block = transformer_flow.MetaBlock(
        config.patch_dim,
        config.width,
        config.num_patches,
        transformer_flow.PermutationIdentity(config.num_patches),
        num_layers=config.layers[0],
        num_classes=config.num_classes,
    )
    block = block.to(bench.device).requires_grad_(False)
    z = torch.randn(batch, config.num_patches, config.patch_dim, device=bench.device)
    y = torch.arange(batch, device=bench.device) % config.num_classes
    with torch.inference_mode(), torch.autocast(bench.device, torch.bfloat16):
        arguments = (y, GUIDANCE.weight)
        block.reverse(z[:, :16].clone(), *arguments, annealed_guidance=True)
        took = bench.median(lambda: block.reverse(z.clone(), *arguments, annealed_guidance=True))
    return round(took, 4)
