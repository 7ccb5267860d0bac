"""Image files, whatever they are, to square 8-bit images: decode, crop, encode."""

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from io import BytesIO
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data_prep.settings import HONEST_PIXELS, Settings
from tarflow_dist.errors import UserError

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # of TIFF's tags
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_DROPPED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # Pillow refuses an image for large ones
PNG_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts that may tell it
PNG_LARGEST_TEXT = 1 << 20
ENCODINGS = ("png", "jpeg", "webp", "raw", "keep")
MAX_PIXELS = 1 << 27  # of an image when its short side is `size`: 400 MB
PLUG_INS = ("pillow_heif.HeifImagePlugin", "pillow_jxl")  # formats that Pillow lacks, if installed
# They run programs (EPS), or Pillow knows them by name alone and reads no pixels.
NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
for plug_in in PLUG_INS:
    with suppress(ImportError):
        import_module(plug_in)
Image.init()
# those that begin with a signature go first, since their content alone tells
FORMATS = sorted(Image.OPEN.keys() - NOT_READ, key=lambda name: (not Image.OPEN[name][1], name))
SIGNED_FORMATS = [name for name in FORMATS if Image.OPEN[name][1]]
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS
)
# what files of a format are called, where that is not the format's own name
KINDS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


class Stored(NamedTuple):
    """An image as it will be stored."""

    data: bytes
    kind: str
    """What `data` is: raw, or the suffix of such a file."""
    original_bytes: int
    original_width: int
    """In pixels, before EXIF's orientation is applied."""
    original_height: int


def prepare_image(content: bytes | np.ndarray, settings: Settings, *, channels: int) -> Stored:
    """An image of any size and kind as the `settings` want it stored. Damage is found as far as the
    format allows: a PNG has checksums; a JPEG with a flipped bit mostly decodes, to other pixels.

    Args:
        content: a file's bytes, or pixels: uint8, (H, W) or (H, W, 3). With `encode` keep it comes
            back as it is, once it has been decoded.
        channels: 1 for grey, 3 for RGB.

    Raises:
        Image.DecompressionBombWarning, Image.DecompressionBombError: the image has more than
            `max_pixels`, and is not decoded.
        Exception: Pillow's decoders raise of every kind on files that are damaged or no image, or
            that decode to more pixels than Pillow allows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that make no sense, by the thousand
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with open_image(content, settings.max_pixels) as image:
            if image.format == "PNG":  # checksums, which decoding does not look at
                open_image(content, settings.max_pixels).verify()
            about = (len(content) if isinstance(content, bytes) else content.nbytes, *image.size)
            if settings.encode == "keep":
                if isinstance(content, np.ndarray):
                    raise UserError("--encode keep stores files, and the source has bare pixels")
                assert image.format is not None
                image.load()
                return Stored(content, _kind(image.format), *about)
            size = settings.size
            assert size is not None
            if image.width * image.height * (size / min(image.size)) ** 2 > MAX_PIXELS:
                raise ValueError(f"too narrow to be resized: {image.width}x{image.height}")
            pixels = CROPS[settings.crop](to_8bit(image, channels), size)
            return Stored(*encode_image(pixels, settings.encode), *about)


def open_image(content: bytes | np.ndarray, max_pixels: int = HONEST_PIXELS) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow knows it no other way
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    return Image.open(BytesIO(_without_texts(content)), formats=FORMATS)


def _without_texts(content: bytes) -> bytes:
    """`content`, if it is a PNG, without texts and colour profiles, but for those texts of no great
    size that may say how the picture is turned. What is damaged stays as it is."""
    if not content.startswith(PNG_SIGNATURE):
        return content
    return PNG_SIGNATURE + b"".join(_kept_chunks(content))


def _kept_chunks(png: bytes) -> Iterator[bytes]:
    begin = len(PNG_SIGNATURE)
    while begin + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, begin)
        end = begin + 12 + length
        keyword = png[begin + 8 : begin + 8 + 80].partition(b"\0")[0]
        tells = keyword in PNG_ORIENTATION and length <= PNG_LARGEST_TEXT
        if kind not in PNG_DROPPED or (kind != b"iCCP" and tells):
            yield png[begin:end]
        begin = end


def is_image(stream: IO[bytes]) -> bool:
    """Whether the content of a file, whatever its name, is that of a format that Pillow reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.open(stream, formats=SIGNED_FORMATS)
        except Image.DecompressionBombError:
            return True
        except Exception:  # decoders raise of every kind
            return False
    return True


def _kind(format_name: str) -> str:
    return KINDS.get(format_name, format_name.lower())


def to_8bit(image: Image.Image, channels: int) -> Image.Image:
    """The image upright, as grey (1 channel) or RGB (3): EXIF orientation applied, transparency
    laid on white, 16 bits scaled to 8. Colour profiles are not applied, as is the field's custom.

    Raises:
        ValueError: the range of its values is not known (floats, 32-bit integers).
    """
    _halve_transparent_level(image)
    image.load()
    with suppress(Exception):  # damaged metadata tell nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # I;16 and kin; some 16-bit files open as 32-bit I
        image = _deep_grey_to_8bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)  # which copies in any case


def _halve_transparent_level(image: Image.Image) -> None:
    """Pillow reads PNGs of 16-bit colours in 8 bits, but leaves the transparent colour as it is."""
    level = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    rawmode = tiles[0][3] if image.format == "PNG" and tiles else ""
    if rawmode == "RGB;16B" and isinstance(level, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in level)


def _deep_grey_to_8bit(image: Image.Image) -> Image.Image:
    """Grey of 9 to 16 bits, its transparent level white."""
    values = np.asarray(image).astype(np.int64)
    bits, white_is_zero = 16, False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, white_is_zero = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0
    top = (1 << bits) - 1 if 8 < bits < 16 else 0xFFFF
    if values.min() < 0 or values.max() > top:
        raise ValueError("32-bit pixels")
    if white_is_zero:
        values = top - values
    grey = np.round(values * 255 / top).astype(np.uint8)
    level = image.info.get("transparency")
    if isinstance(level, int):
        grey[values == level] = 255
    return Image.fromarray(grey)


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


def encode_image(image: Image.Image, encode: str) -> tuple[bytes, str]:
    """An image file without metadata, which `image` loses, and its kind. JPEG at quality 95, its
    chroma not subsampled; png and webp lossless; raw is the pixels, uint8 (H, W, C)."""
    if encode == "raw":
        return image.tobytes(), "raw"
    file = BytesIO()
    image.info = {}
    if encode == "png":
        image.save(file, "PNG")
    elif encode == "webp":
        image.save(file, "WEBP", lossless=True)
    else:
        image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue(), _kind(encode.upper())
