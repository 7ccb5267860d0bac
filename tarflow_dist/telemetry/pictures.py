"""Pictures of samples."""

import numpy as np
from numpy.typing import NDArray

GUTTER = 4  # white pixels between the images of a grid
SMALLEST = 64  # images below that many pixels are magnified


def image_grid(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """uint8 (N, H, W, C) → one picture (height, width, C) with `columns` images a row."""
    N, H, W, C = images.shape
    scale = max(1, SMALLEST // H)
    height, width = H * scale + GUTTER, W * scale + GUTTER
    rows = -(-N // columns)
    grid = np.full((rows * height - GUTTER, columns * width - GUTTER, C), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        grid[top : top + H * scale, left : left + W * scale] = large
    return grid
