"""The order in which a block sees the patches of an image."""

from torch import Tensor


def is_reversed(block: int) -> bool:
    """Whether block 0, 1, … sees the patches last to first: every second one does."""
    return block % 2 == 1


def image_place(place: int | Tensor, num_patches: int, *, reverse: bool) -> int | Tensor:
    """Where in the image the patch at `place` of a block's own order is."""
    return num_patches - 1 - place if reverse else place


def permute(patches: Tensor, *, reverse: bool, dim: int = 1) -> Tensor:
    """Image order to a block's own order along `dim`, or back: each is its own inverse."""
    return patches.flip(dim) if reverse else patches
