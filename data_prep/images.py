"""Image files, whatever they are, to square 8-bit images: decode, crop, encode."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ENCODINGS = ("png", "jpeg")


def prepare_image(
    content: Path | bytes | np.ndarray, *, size: int, channels: int, crop: str, encoding: str
) -> bytes:
    """An image of any size and kind as an encoded file of `size` x `size` pixels.

    Args:
        content: a file, a file's bytes, or pixels: uint8, (H, W) or (H, W, 3).
        channels: 1 for grey, 3 for RGB.
        crop: a key of CROPS.
        encoding: one of ENCODINGS.

    Raises:
        Exception: Pillow's decoders raise of every kind on files that are damaged or no image.
    """
    with open_image(content) as image:
        return encode(CROPS[crop](to_8bit(image, channels), size), encoding)


def open_image(content: Path | bytes | np.ndarray) -> Image.Image:
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    return Image.open(BytesIO(content) if isinstance(content, bytes) else content)


def to_8bit(image: Image.Image, channels: int) -> Image.Image:
    """The image upright, as grey (1 channel) or RGB (3): EXIF orientation applied, transparency
    laid on white, 16 bits scaled to 8. Colour profiles are not applied, as is the field's custom.

    Raises:
        ValueError: the range of its values is not known (floats, 32-bit integers).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # I;16 and kin; some 16-bit files open as 32-bit I
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's `center_crop_arr`: halved with a box filter while the short side is at least twice
    `size`, then bicubic until it is `size`, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def tarflow_crop(image: Image.Image, size: int) -> Image.Image:
    """TarFlow's, that is torchvision's Resize and CenterCrop: bilinear with antialiasing until the
    short side is `size`, then the centre."""
    short = min(image.size)
    image = image.resize(
        (image.width * size // short, image.height * size // short), Image.Resampling.BILINEAR
    )
    return _cut(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def _cut(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "adm": adm_crop,
    "tarflow": tarflow_crop,
}


def encode(image: Image.Image, encoding: str) -> bytes:
    """An image file without metadata; JPEG at quality 95, its chroma not subsampled."""
    file = BytesIO()
    pixels = Image.fromarray(np.asarray(image))  # leaves the original's metadata behind
    if encoding == "png":
        pixels.save(file, "PNG")
    else:
        pixels.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()
