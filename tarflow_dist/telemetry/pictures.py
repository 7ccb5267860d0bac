"""Samples side by side, small ones magnified."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GUTTER = 4  # white pixels between images
SMALLEST = 64  # pixels of an image's side as shown
NAME_WIDTH, NAME_HEIGHT = 160, 20  # pixels beside and above the images


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
    scale = max(1, SMALLEST // images.shape[1])
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gutter = ((0, 0), (0, 0), (0, GUTTER), (0, 0))
    canvas = np.concatenate(np.pad(large, gutter, constant_values=255), axis=1)
    return Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas)


def _smaller(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    C = image.shape[2]
    picture = Image.fromarray(image.squeeze(2) if C == 1 else image)
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)).reshape(side, side, C)


def picture_grid(
    rows: Sequence[NDArray[np.uint8]], names: Sequence[str] = (), largest: int | None = None
) -> Image.Image:
    """Rows of images (B, H, W, C), each as `strip` shows it; `names` of as many rows stand beside
    them, others above the columns."""
    strips = [strip(row, largest) for row in rows]
    height, width = strips[0].height + GUTTER, strips[0].width // len(rows[0])
    beside = len(names) == len(rows)
    left = NAME_WIDTH if names and beside else 0
    top = NAME_HEIGHT if names and not beside else 0
    size = left + max(pictures.width for pictures in strips), top + len(strips) * height
    grid = Image.new(strips[0].mode, size, "white")
    for i, pictures in enumerate(strips):
        grid.paste(pictures, (left, top + i * height))
    draw, letters = ImageDraw.Draw(grid), font(16 if beside else 12)
    for i, name in enumerate(names):
        if beside:
            at, room, anchor = (GUTTER, i * height + height // 2), NAME_WIDTH - 3 * GUTTER, "lm"
        else:
            at, room, anchor = (i * width, top - GUTTER), width - GUTTER, "ls"
        draw.text(at, fitted(name, letters, room), "black", letters, anchor=anchor)
    return grid
