"""Samples side by side."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GUTTER = 4  # white pixels between images
SMALLEST, LARGEST = 64, 128  # pixels of an image's side as shown


def strip(images: NDArray[np.uint8]) -> Image.Image:
    """The images (B, H, W, C) side by side, each followed by a gutter to the right; small ones
    magnified in whole steps, large ones made smaller."""
    shown = [_sized(Image.fromarray(i.squeeze(2) if i.shape[2] == 1 else i)) for i in images]
    width = shown[0].width + GUTTER
    canvas = Image.new(shown[0].mode, (len(shown) * width, shown[0].height), "white")
    for place, image in enumerate(shown):
        canvas.paste(image, (place * width, 0))
    return canvas


def _sized(image: Image.Image) -> Image.Image:
    scale = max(1, SMALLEST // image.height)
    if scale > 1:
        size = image.width * scale, image.height * scale
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((LARGEST, LARGEST))
    return image


def image_grid(images: NDArray[np.uint8], columns: int) -> Image.Image:
    """The images (B, H, W, C) in rows of `columns`, sized as in `strip`."""
    strips = [strip(images[i : i + columns]) for i in range(0, len(images), columns)]
    height = strips[0].height + GUTTER
    grid = Image.new(strips[0].mode, (strips[0].width, len(strips) * height), "white")
    for i, pictures in enumerate(strips):
        grid.paste(pictures, (0, i * height))
    return grid
