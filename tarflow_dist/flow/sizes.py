"""Which sizes of a TARFlow fit together. Imports no torch, so that a config is checked at once."""

from collections.abc import Sequence


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
    width: int,
    head_dim: int,
    num_blocks: int,
    layers_per_block: int | Sequence[int],
    noise: str,
    sigma: float | None,
) -> None:
    """Raises `ValueError`, in a sentence that names the fields, if the sizes don't fit together."""
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    if width % head_dim:
        raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}")
    if noise == "gaussian" and sigma is None:
        raise ValueError("noise is gaussian, which needs a sigma")
    if noise == "uniform" and sigma is not None:
        raise ValueError(f"sigma is {sigma}, but noise is uniform, which has none")
    layers_of_blocks(num_blocks, layers_per_block)
