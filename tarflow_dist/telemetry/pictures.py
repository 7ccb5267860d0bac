"""Samples side by side, small ones magnified."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

GUTTER = 4  # white pixels between images
SMALLEST = 64  # pixels of an image's side as shown


def font(size: int) -> ImageFont.FreeTypeFont:
    """One that has the letters of most languages, which Pillow's own has not."""
    import matplotlib

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size
    )


def fitted(text: str, letters: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of `text` as goes into `width` pixels."""
    while text != "…" and letters.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def strip(images: NDArray[np.uint8], largest: int | None = None) -> Image.Image:
    """The images (B, H, W, C) side by side, each followed by a gutter to the right; those above
    `largest` pixels made smaller."""
    if largest is not None and images.shape[1] > largest:
        images = np.stack([_smaller(image, largest) for image in images])
    B, H, W, C = images.shape
    scale = max(1, SMALLEST // H)
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    width = W * scale + GUTTER
    canvas = np.full((H * scale, B * width, C), 255, np.uint8)
    for i, image in enumerate(large):
        canvas[:, i * width : i * width + W * scale] = image
    return Image.fromarray(canvas.squeeze(2) if C == 1 else canvas)


def _smaller(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    C = image.shape[2]
    picture = Image.fromarray(image.squeeze(2) if C == 1 else image)
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)).reshape(side, side, C)


def image_grid(images: NDArray[np.uint8], columns: int) -> Image.Image:
    """The images (B, H, W, C) in rows of `columns`."""
    strips = [strip(images[i : i + columns]) for i in range(0, len(images), columns)]
    height = strips[0].height + GUTTER
    grid = Image.new(strips[0].mode, (strips[0].width, len(strips) * height), "white")
    for i, pictures in enumerate(strips):
        grid.paste(pictures, (0, i * height))
    return grid
