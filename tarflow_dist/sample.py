"""Draws images from a model, or sends given images through it and back.

    python -m tarflow_dist.sample MODEL --labels 1,2,3 --guidance 2 --out grid.png
    python -m tarflow_dist.sample MODEL --labels 1,2,3 --trace --out trace.png
    python -m tarflow_dist.sample MODEL --reconstruct a.png b.png --out there-and-back.png
    python -m tarflow_dist.sample MODEL --interpolate a.png b.png --out between.png

A flow is exactly invertible: what is encoded comes back.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow_dist.errors import UserError, enough_memory, run_command
from tarflow_dist.files import write_whole
from tarflow_dist.options import (
    MODEL_HELP,
    add_denoising_options,
    add_dtype_option,
    add_guidance_options,
    check_writable,
    class_numbers,
    command_parser,
    denoising_of,
    guidance_of,
    load_model,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tarflow_dist.flow.denoise import Denoising
    from tarflow_dist.flow.guidance import Guidance
    from tarflow_dist.models.tarflow import TarFlow

STATIONS = 4
"""Images of a denoising that are shown, the last one among them."""


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)

    from tarflow_dist.telemetry.pictures import picture_grid

    flow = load_model(args.model, args.device, args.dtype)
    guidance = guidance_of(flow, args.guidance, args)
    noisy = args.no_denoise or args.reconstruct or args.interpolate
    denoising = denoising_of(flow, args.denoise_steps, args, wanted=not noisy)
    y = labels_of(args, flow)
    with enough_memory("so many images at once", "ask for fewer images"):
        if args.reconstruct:
            rows = reconstruct(flow, read_images(flow, args.reconstruct), y)
        elif args.interpolate:
            rows = interpolate(flow, read_images(flow, args.interpolate), y, args.steps or 8)
        elif args.trace:
            rows = trace(flow, y, guidance, denoising, args)
        else:
            rows = sample(flow, y, guidance, denoising, args)
    with write_whole(args.out) as part:
        picture_grid(list(rows.cpu().numpy()), captions(args, flow, y)).save(part, "PNG")
    print(f"{args.out}: {len(rows)} x {rows.shape[1]} images")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("sample", __doc__)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    add(
        "--labels",
        help="class ids or names with commas between, -1 for none; a name that has a comma or is a "
        """number in double quotes: '"cats, big",3,dogs'; default the first 10 classes""",
    )
    add(
        "--count",
        type=int,
        help="images of each label, default 1, or of an unconditional model, default 10",
    )
    add("--seed", type=int, default=0, help="of the noise; default 0")
    add("--no-denoise", action="store_true", help="leave the training noise in")
    add("--out", type=Path, default=Path("samples.png"), help="a PNG; default samples.png")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--trace", action="store_true", help="show what each block makes of the noise"
    )
    what.add_argument(
        "--reconstruct", type=Path, nargs="+", metavar="IMAGE", help="send them there and back"
    )
    what.add_argument(
        "--interpolate", type=Path, nargs=2, metavar="IMAGE", help="go from one to the other"
    )
    add("--steps", type=int, help="images from one to the other, with --interpolate; default 8")
    add("--device", help="default cuda if there is one, else cpu")
    add_dtype_option(add)
    add("--guidance", type=float, default=0.0, help="w; default 0: none")
    add_guidance_options(add)
    add_denoising_options(add, steps=int)
    args = parser.parse_args(argv)
    if args.count is not None and args.count < 1:
        raise UserError("--count must be 1 or more")
    if args.steps is not None and (args.steps < 2 or not args.interpolate):
        raise UserError("--steps goes with --interpolate, and must be 2 or more")
    if (args.reconstruct or args.interpolate) and (args.guidance or args.count is not None):
        raise UserError(
            "given images go through the flow as they are: leave --guidance and --count"
        )
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out} should end in .png")
    check_writable(args.out)
    return args


def labels_of(args: argparse.Namespace, flow: "TarFlow") -> "Tensor | None":
    """The labels asked for, each `--count` times; those of given images one an image, or one for
    all, or none.

    Raises:
        UserError: labels that don't fit the model or the images.
    """
    import torch

    if args.labels is not None and not flow.num_classes:
        raise UserError(f"{args.model} is unconditional and takes no labels: leave --labels out")
    if not flow.num_classes:
        return None
    asked = None if args.labels is None else class_numbers(args.labels, flow)
    if given := args.reconstruct or args.interpolate:
        labels = asked or [-1]
        labels = labels * len(given) if len(labels) == 1 else labels
        if len(labels) != len(given):
            raise UserError(f"{len(labels)} labels were given for {len(given)} images")
    else:
        labels = list(range(min(flow.num_classes, 10))) if asked is None else asked
        labels = [label for label in labels for _ in range(args.count or 1)]
    return torch.tensor(labels, device=flow.device)


def sample(
    flow: "TarFlow",
    y: "Tensor | None",
    guidance: "Guidance",
    denoising: "Denoising",
    args: argparse.Namespace,
) -> "Tensor":
    """uint8 (rows, columns, H, W, C): a row a label."""
    import torch

    count = args.count or (1 if flow.num_classes else 10)
    batch = count if y is None else len(y)
    print(f"sampler: {flow.sampler(batch, guidance)}")
    images = flow.sample(
        y,
        **guidance.arguments(),
        denoise=not args.no_denoise,
        **denoising.arguments(),
        seed=args.seed,
        index=torch.arange(batch),
        progress=True,
    )
    if flow.redrawn:
        print(f"{flow.redrawn} samples ran away and were drawn again")
    columns = args.count or batch
    return images.unflatten(0, (-1, columns))


def trace(
    flow: "TarFlow",
    y: "Tensor | None",
    guidance: "Guidance",
    denoising: "Denoising",
    args: argparse.Namespace,
) -> "Tensor":
    """A row a sample: its noise, what each block makes of it, and the image denoised, by an
    iTARFlow with some stations on the way."""
    import torch

    from tarflow_dist.flow.patches import unpatchify

    batch = args.count or 4 if y is None else len(y)
    z = flow.noise_of(torch.arange(batch), seed=args.seed)
    steps = [z]
    x = flow.decode(z, y, **guidance.arguments(), on_block=steps.append)
    images = [unpatchify(step, flow.patch_size, flow.image_size) for step in steps]
    if flow.noise == "gaussian" and not args.no_denoise:
        path: list[Tensor] = []
        index = torch.arange(batch)
        flow.denoised(x, y, denoising, index=index, seed=args.seed, on_step=path.append)
        every = -(-len(path) // STATIONS)
        images += path[::-1][::every][::-1]
    return shown(flow, torch.stack(images, dim=1))


def reconstruct(flow: "TarFlow", x: "Tensor", y: "Tensor | None") -> "Tensor":
    """A row an image: itself, its latents, and their way back."""
    import torch

    from tarflow_dist.flow.patches import unpatchify

    level = least_level(flow)
    z = flow.encode(x, y, level)
    back = flow.decode(z, y, sigma=level)
    print(f"largest difference after encode and decode: {float((back - x).abs().max()):.2g}")
    latents = unpatchify(z, flow.patch_size, flow.image_size) / 3  # ±3 standard deviations
    return shown(flow, torch.stack([x, latents, back], dim=1))


def interpolate(flow: "TarFlow", x: "Tensor", y: "Tensor | None", steps: int) -> "Tensor":
    """One row from the first image to the second, along the great circle of their latents."""
    import torch

    level = least_level(flow)
    z = flow.encode(x, y, level)
    start, end = z[:1], z[1:]
    cosine = torch.cosine_similarity(start.flatten(), end.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(max=1 - 5e-7))  # from there on the circle is a straight line
    along = torch.linspace(0, 1, steps, dtype=z.dtype, device=z.device)[:, None, None]
    z = (torch.sin((1 - along) * angle) * start + torch.sin(along * angle) * end) / angle.sin()
    # the label changes half way, where there are two
    labels = None if y is None else torch.where(along.flatten() < 0.5, y[0], y[1])
    return shown(flow, flow.decode(z, labels, sigma=level)[None])


def least_level(flow: "TarFlow") -> float | None:
    """An iTARFlow takes given images, which have no noise, for the least noisy that it knows."""
    return None if flow.sigma_range is None else flow.sigma_range[0]


def shown(flow: "TarFlow", images: "Tensor") -> "Tensor":
    """(rows, columns, C, H, W) in the model's range → uint8 (rows, columns, H, W, C)."""
    from tarflow_dist.flow.noise import to_pixels

    return to_pixels(images, flow.noise).permute(0, 1, 3, 4, 2)


def read_images(flow: "TarFlow", files: Sequence[Path]) -> "Tensor":
    """Images in the model's range (B, C, H, W), the middle of each in the model's size.

    Raises:
        UserError: a file can't be read.
    """
    import numpy as np
    import torch
    from PIL import ImageOps

    from data_prep.images import to_8bit
    from tarflow_dist.evaluation.image_sets import open_picture
    from tarflow_dist.flow.noise import dequantise, scale_pixels

    pixels = []
    for file in files:
        with open_picture(file) as image:
            fitted = ImageOps.fit(
                to_8bit(image, flow.config.in_channels), (flow.image_size, flow.image_size)
            )
        pixels.append(np.asarray(fitted).reshape(flow.image_size, flow.image_size, -1))
    k = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(flow.device)
    if flow.noise == "gaussian":
        return scale_pixels(k, flow.dtype)
    return dequantise(k, torch.full(k.shape, 0.5, dtype=flow.dtype, device=k.device))


def captions(args: argparse.Namespace, flow: "TarFlow", y: "Tensor | None") -> list[str]:
    """What to write beside the rows of samples, or above the columns of a single row: their
    classes' names, or ids where those aren't known."""
    if y is None or args.reconstruct or args.interpolate:
        return []
    numbers = y.tolist() if args.trace else y.tolist()[:: args.count or 1]
    names = flow.class_names
    return ["no label" if n < 0 else names[n] if names else str(n) for n in numbers]


if __name__ == "__main__":
    run_command(main)
