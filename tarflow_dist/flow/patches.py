"""Images to sequences of patches and back."""

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) → (B, N, D): N patches row by row, the D = C·p² values of each channel-first."""
    B, C, H, W = images.shape
    p = patch_size
    grid = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(patches: Tensor, patch_size: int, image_size: int) -> Tensor:
    """(B, N, D) → (B, C, H, W), the inverse of `patchify` for square images."""
    B, _, D = patches.shape
    p, side = patch_size, image_size // patch_size
    grid = patches.reshape(B, side, side, D // p**2, p, p).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(B, D // p**2, image_size, image_size)
