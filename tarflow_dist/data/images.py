"""Stored images back to pixels."""

from io import BytesIO

from PIL import Image

FORMATS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}
"""Pillow's names of what a set's images are encoded as. Nothing else is decoded: a set may be a
stranger's, and some of Pillow's formats run programs (EPS)."""


def decode_image(data: bytes, *, encode: str, side: int, channels: int) -> Image.Image:
    """An image of `side` x `side` pixels, grey (1 channel) or RGB (3), as data_prep stored it.

    Args:
        encode: the set's: raw, or a key of FORMATS.

    Raises:
        ValueError: it is no such image. What it claims to be is looked at before it is decoded.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        if encode == "raw":
            return Image.frombytes(mode, (side, side), data)
        image = Image.open(BytesIO(data), formats=[FORMATS[encode]])
        if (image.size, image.mode) != ((side, side), mode):
            found = f"{image.width}x{image.height} {image.mode}"
            raise ValueError(f"{found}, not {side}x{side} {mode}")
        image.load()
    except ValueError:
        raise
    except Exception as error:  # decoders raise of every kind
        raise ValueError(f"no image of the set's kind ({encode}): {error}") from error
    return image
