"""The order in which a block sees the patches of an image."""

from torch import Tensor


def is_reversed(block: int) -> bool:
    """Whether block 0, 1, … sees the patches last to first: every second one does."""
    return block % 2 == 1


def permute(patches: Tensor, *, reverse: bool, dim: int = 1) -> Tensor:
    """Image order to a block's own order along `dim`, or back: each is its own inverse."""
    return patches.flip(dim) if reverse else patches
