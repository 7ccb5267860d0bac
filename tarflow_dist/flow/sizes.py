"""Which sizes of a TARFlow fit together. Imports no torch, so that a config is checked at once."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

Noise = Literal["gaussian", "uniform"]


def layers_of_blocks(num_blocks: int, layers_per_block: int | Sequence[int]) -> list[int]:
    """Transformer layers of each flow block, from one number for all or a list of T numbers.

    Raises:
        ValueError: the list's length is not `num_blocks`.
    """
    if isinstance(layers_per_block, int):
        return [layers_per_block] * num_blocks
    if len(layers_per_block) != num_blocks:
        raise ValueError(
            f"layers_per_block has {len(layers_per_block)} entries, but num_blocks is {num_blocks}"
        )
    return list(layers_per_block)


def check_sizes(
    *,
    image_size: int,
    patch_size: int,
    in_channels: int,
    width: int,
    head_dim: int,
    num_blocks: int,
    layers_per_block: int | Sequence[int],
    num_classes: int,
    noise: str,
    sigma: float | None,
) -> None:
    """Raises `ValueError`, in a sentence that names the fields, if the sizes don't fit together."""
    counts = {
        "image_size": image_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "width": width,
        "head_dim": head_dim,
        "num_blocks": num_blocks,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, but must be 1 or more")
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}, but must be 0 or more")
    if min(layers_of_blocks(num_blocks, layers_per_block)) < 1:
        raise ValueError(f"layers_per_block is {layers_per_block}, but must be 1 or more")
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    if image_size == patch_size:
        raise ValueError(f"image_size {image_size} is a single patch: make patch_size smaller")
    if width % head_dim:
        raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}")
    if noise not in get_args(Noise):
        raise ValueError(f"noise is {noise!r}, but must be one of {', '.join(get_args(Noise))}")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}, but must be a number above 0")
    if noise == "gaussian" and sigma is None:
        raise ValueError("noise is gaussian, which needs a sigma")
    if noise == "uniform" and sigma is not None:
        raise ValueError(f"sigma is {sigma}, but noise is uniform, which has none")
