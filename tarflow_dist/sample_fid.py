"""Draws samples on any number of ranks and measures their Fréchet distance to a reference set.

    python -m tarflow_dist.sample_fid --model MODEL --reference SHARDS --num-samples 50000 \\
        --guidance 1.5 --annealed --inception-weights WEIGHTS.pth
    torchrun --nproc-per-node 8 -m tarflow_dist.sample_fid ...

The samples are the same on any number of ranks. To take up an interrupted run, run the same command
again: only the chunks that are missing are drawn.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflow_dist.errors import UserError, run_command
from tarflow_dist.evaluation.features import EXTRACTORS, check_inception_weights

if TYPE_CHECKING:
    import torch

    from tarflow_dist.pretrained import TarFlow

UINT8_RULES = {  # flow/noise.py, to_pixels
    "gaussian": "round((x + 1) * 127.5), clipped",
    "uniform": "floor((x + 1) * 128), clipped",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tarflow_dist.sample_fid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of model.safetensors and config.json")
    add("--reference", required=True, help="SHARDS folder made by data_prep, or its s3:// address")
    add("--split", default="train", choices=("train", "val"), help="of the reference")
    add("--num-samples", type=int, required=True)
    add("--guidance", type=float, default=0.0, help="w; 0 is no guidance")
    add("--annealed", action="store_true", help="let w grow along the sequence, as published")
    add("--guide", default="both", choices=("both", "mu", "alpha"), help="what is guided")
    add("--attn-temp", type=float, default=1.0, help="guides an unconditional model")
    add("--no-denoise", action="store_true", help="leave the score step out")
    add("--labels", choices=("random", "balanced"), help="of a conditional model; default random")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=100, help="samples a batch and a file of the store")
    add("--features", default="inception", choices=EXTRACTORS, help="what is compared")
    add("--inception-weights", type=Path, help="FID's Inception v3, a .pth file")
    add("--out", type=Path, help="folder of the samples; default samples/MODEL's name")
    args = parser.parse_args(argv)
    args.out = args.out or Path("samples", args.model.resolve().name)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """What can be told without loading anything.

    Raises:
        UserError: a number out of range, or a path that leads nowhere.
    """
    if args.num_samples < 2:
        raise UserError("--num-samples must be at least 2: a covariance needs two images")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    for option, folder in (("--model", args.model), ("--reference", args.reference)):
        if "://" not in str(folder) and not Path(folder).is_dir():
            raise UserError(f"{option} {folder} is not a folder")
    if args.features == "inception":
        check_inception_weights(args.inception_weights)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_arguments(args)

    from tarflow_dist import distributed
    from tarflow_dist.data.shards import open_shards
    from tarflow_dist.evaluation.export import write_grid, write_npz
    from tarflow_dist.evaluation.features import make_extractor
    from tarflow_dist.evaluation.measure import measure, reference_batches, sample_batches
    from tarflow_dist.evaluation.sampling import draw_missing_chunks, make_draw
    from tarflow_dist.evaluation.statistics import frechet_distance
    from tarflow_dist.evaluation.store import SampleStore
    from tarflow_dist.pretrained import TarFlow

    device = distributed.init()
    flow = TarFlow.from_pretrained(args.model).requires_grad_(False).to(device)
    settings = sample_settings(args, flow)
    reference = open_shards(args.reference, args.split)
    image_shape = (flow.in_channels, flow.image_size, flow.image_size)
    check_reference(args.reference, reference.image_shape, image_shape)
    extractor = make_extractor(
        args.features,
        image_shape=image_shape,
        inception_weights=args.inception_weights,
        device=device,
    )
    store = SampleStore(args.out, settings)
    if distributed.is_main():
        store.begin()

    seconds: dict[str, float] = {}
    with timed(seconds, "sampling"):
        chunks_drawn = draw_missing_chunks(store, make_draw(flow, settings))
    with timed(seconds, "sample_features"):
        images, share = sample_batches(store)
        samples = measure(images, extractor, label="samples", share=share, device=device)
    with timed(seconds, "reference_features"):
        images, share = reference_batches(reference, args.batch_size)
        real = measure(images, extractor, label="reference", share=share, device=device)
    if distributed.is_main():
        with timed(seconds, "distance"):
            distance = frechet_distance(
                samples.mean(), samples.covariance(), real.mean(), real.covariance()
            )
        with timed(seconds, "export"):
            write_npz(store, args.out / "samples.npz")
            write_grid(store, args.out / "grid.png")
        result = {
            "frechet_distance": distance,
            "features": extractor.name,
            **describe_reference(args, reference.manifest, count=int(real.count)),
            "model": str(args.model),
            **settings,
            "device": describe_device(device),
            "world_size": distributed.world_size(),
            "chunks_drawn": chunks_drawn,
            "seconds": seconds,
        }
        report(result, args.out / "result.json")
    distributed.shutdown()


def sample_settings(args: argparse.Namespace, flow: "TarFlow") -> dict[str, Any]:
    """All that the samples depend on, as JSON values. `labels` is None for an unconditional model.

    Raises:
        UserError: guidance or labels that this model can't have.
    """
    from tarflow_dist.flow.guidance import Guidance

    conditional = flow.num_classes > 0
    try:
        guidance = Guidance(args.guidance, args.annealed, args.guide, args.attn_temp)
        guidance.check(conditional=conditional)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.labels and not conditional:
        raise UserError(f"{args.model} is unconditional and takes no labels: leave --labels out")
    return {
        "weights_sha256": sha256(*sorted(args.model.glob("*.safetensors"))),
        "config_sha256": hashlib.sha256(json.dumps(flow.config).encode()).hexdigest(),
        "dtype": str(next(flow.parameters()).dtype).removeprefix("torch."),
        "num_samples": args.num_samples,
        "chunk_size": args.batch_size,
        "seed": args.seed,
        "labels": (args.labels or "random") if conditional else None,
        "guidance": guidance.weight,
        "annealed": guidance.annealed,
        "guide": guidance.guide,
        "attn_temp": guidance.attn_temp,
        "denoise": flow.sigma is not None and not args.no_denoise,
        "uint8_rule": UINT8_RULES[flow.noise],
    }


def check_reference(folder: str, shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> None:
    """Raises `UserError` if the reference's images are of another `shape` than the model's."""
    if shape != image_shape:
        there, wanted = ("×".join(map(str, s)) for s in (shape, image_shape))
        raise UserError(
            f"the images of {folder} are {there} and the model draws {wanted} (channels × height × "
            "width): prepare a reference of that size with data_prep"
        )


def describe_reference(args: argparse.Namespace, manifest: Path, *, count: int) -> dict[str, Any]:
    return {
        "reference": str(args.reference),
        "reference_split": args.split,
        "reference_images": count,
        "reference_manifest_sha256": sha256(manifest),
    }


def describe_device(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sha256(*files: Path) -> str:
    """The digest of the files' bytes one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Notes how long the body takes under `stage`."""
    began = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - began, 3)


def report(result: dict[str, Any], file: Path) -> None:
    """Writes `result` with the versions it was made with to `file`, and prints the gist."""
    from tarflow_dist.files import write_whole
    from tarflow_dist.telemetry.environment import describe_environment

    with write_whole(file) as part:
        whole = result | {"environment": describe_environment()}
        part.write_text(json.dumps(whole, indent=2) + "\n")
    guidance = f"{result['guidance']}{' annealed' if result['annealed'] else ''}"
    rows = {
        "Fréchet distance": f"{result['frechet_distance']:.4f}",
        "features": result["features"],
        "samples": f"{result['num_samples']}, labels {result['labels'] or 'none'}, "
        f"seed {result['seed']}",
        "guidance": f"{guidance}, guide {result['guide']}, attn_temp {result['attn_temp']}",
        "reference": f"{result['reference']} {result['reference_split']}, "
        f"{result['reference_images']} images",
        "seconds": ", ".join(f"{stage} {s:.1f}" for stage, s in result["seconds"].items()),
        "written to": str(file.parent),
    }
    for name, value in rows.items():
        print(f"{name:<18}{value}")


if __name__ == "__main__":
    run_command(main)
