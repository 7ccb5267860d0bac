"""Decode, crop and encode against second implementations and torchvision."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin, UnidentifiedImageError
from torchvision import transforms

from data_prep.encode import store_image
from data_prep.images import (
    Stored,
    adm_crop,
    encode_image,
    open_image,
    prepare_image,
    tarflow_crop,
    to_8bit,
)
from data_prep.settings import Settings

SIZES = [(64, 64), (8, 8), (500, 375), (375, 500), (131, 97), (33, 129), (20, 30), (640, 65)]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(width * 1000 + height)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def center_crop_arr(image: Image.Image, size: int) -> np.ndarray:
    """As in openai/guided-diffusion, guided_diffusion/image_datasets.py."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    arr = np.array(image)
    crop_y = (arr.shape[0] - size) // 2
    crop_x = (arr.shape[1] - size) // 2
    return arr[crop_y : crop_y + size, crop_x : crop_x + size]


@pytest.mark.parametrize("shape", SIZES)
def test_adm_crop_is_guided_diffusions(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    assert np.array_equal(np.asarray(adm_crop(image, 64)), center_crop_arr(image, 64))


@pytest.mark.parametrize("shape", SIZES)
def test_tarflow_crop_is_torchvisions(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    theirs = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64)])(image)
    assert np.array_equal(np.asarray(tarflow_crop(image, 64)), np.asarray(theirs))


@pytest.mark.parametrize("crop", [adm_crop, tarflow_crop])
def test_an_image_of_the_right_size_is_left_as_it_is(
    crop: Callable[[Image.Image, int], Image.Image],
) -> None:
    pixels = noise(16, 16)
    assert np.array_equal(np.asarray(crop(Image.fromarray(pixels), 16)), pixels)


def test_png_is_lossless_and_drops_metadata() -> None:
    pixels = noise(20, 20)
    original = Image.open(
        BytesIO(file_of(Image.fromarray(pixels), "PNG", dpi=(300, 300), icc_profile=b"no profile"))
    )
    stored = Image.open(BytesIO(encode_image(original, "png")[0]))
    assert np.array_equal(np.asarray(stored), pixels)
    assert stored.info == {}


def test_jpeg_is_close_and_not_subsampled() -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    stored = Image.open(BytesIO(encode_image(Image.fromarray(smooth), "jpeg")[0]))
    assert stored.format == "JPEG"
    assert np.abs(np.asarray(stored).astype(int) - smooth).max() <= 6
    assert JpegImagePlugin.get_sampling(stored) == 0  # 4:4:4


def test_sixteen_bits_become_eight() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = open_image(file_of(Image.fromarray(values), "PNG"))
    expected = np.round(values / 65535 * 255)
    assert np.array_equal(np.asarray(to_8bit(image, 1)), expected)
    assert np.array_equal(np.asarray(to_8bit(image, 3))[..., 2], expected)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(values: np.ndarray, transparent: tuple[int, ...]) -> bytes:
    """16 bits: grey (H, W) or RGB (H, W, 3)."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def prepared(content: bytes, size: int = 8) -> np.ndarray:
    stored = prepare_image(content, Settings(size=size, encode="raw"), channels=3)
    return np.frombuffer(stored.data, np.uint8).reshape(size, size, 3)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("level", [300, 40_000])
def test_a_transparent_level_of_sixteen_bits_is_white(colours: int, level: int) -> None:
    values = np.full((8, 8, colours), 20_000)
    values[2:4, 3:6] = level
    content = deep_png(values.squeeze(), (level,) * colours)
    expected = np.full((8, 8, 3), 78)
    expected[2:4, 3:6] = 255
    assert abs(prepared(content).astype(int) - expected).max() <= 1


def tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """An uncompressed grey TIFF of `bits` a pixel, in rows of whole bytes."""
    height, width = values.shape
    text = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    rows = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in text)
    if bits == 16:
        rows = values.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    tags |= {273: 8, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    offset = 8 + len(rows)
    return struct.pack("<2sHI", b"II", 42, offset) + rows + struct.pack("<H", len(tags)) + entries


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [12, 16])
def test_grey_of_other_depths(bits: int, photometric: int) -> None:
    """From its own black to its own white, which may be the least value."""
    top = 2**bits - 1
    values = np.linspace(0, top, 64).round().astype(int).reshape(8, 8)
    light = values if photometric else top - values
    expected = np.repeat((light * 255 / top)[..., None], 3, axis=2)
    if bits == 12 and photometric == 0:
        with pytest.raises(UnidentifiedImageError):  # Pillow knows none
            prepared(tiff(values, bits, photometric))
        return
    assert abs(prepared(tiff(values, bits, photometric)) - expected).max() <= 0.5


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("sound", [True, False])
def test_texts_and_profiles_never_cost_a_png(kind: bytes, sound: bool) -> None:
    """However long they are unpacked, or damaged."""
    pixels = noise(8, 8)
    content = file_of(Image.fromarray(pixels), "PNG")
    packed = zlib.compress(bytes(80 << 20))
    data = {
        b"tEXt": b"Comment\0" + bytes(2 << 20),
        b"zTXt": b"Comment\0\0" + packed,
        b"iTXt": b"Comment\0\1\0\0\0" + packed,
        b"iCCP": b"Profile\0\0" + packed,
    }[kind]
    chunk = png_chunk(kind, data)
    if not sound:
        chunk = chunk[:-4] + b"oops"
    assert np.array_equal(prepared(content[:33] + chunk + content[33:]), pixels)
    kept = prepare_image(
        content[:33] + chunk + content[33:], Settings(size=None, encode="keep"), channels=3
    )
    assert kept.data == content[:33] + chunk + content[33:]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_in_every_format(kind: str, turn: int) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 250, 170, 90  # each quarter its own
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    content = file_of(Image.fromarray(np.ascontiguousarray(turned)), kind, exif=exif, **lossless)
    assert abs(prepared(content, 16).astype(int) - upright).max() <= 3


def test_damaged_exif_costs_nothing() -> None:
    pixels = noise(8, 8)
    content = file_of(Image.fromarray(pixels), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffrubbish")
    assert np.array_equal(prepared(content), pixels)


def test_a_phones_photograph_is_no_attack() -> None:
    """12,032 × 9,024 pixels."""
    content = file_of(Image.new("L", (12_032, 9_024), 90), "PNG")
    assert (prepared(content) == 90).all()


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (40, 20))
    upright.paste((255, 0, 0), (0, 0, 20, 20))  # left half red
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    image = to_8bit(open_image(file_of(lying, "PNG", exif=exif)), 3)
    assert image.size == (40, 20)
    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((0, 0), 1)
        image = open_image(file_of(image, "PNG", transparency=0))
        seen = (200, 100, 50)
    else:
        image = Image.new(mode, (4, 4))
        image.putpixel((0, 0), (100, 100, 100, 255) if mode == "RGBA" else (100, 255))
        seen = (100, 100, 100)
    pixels = np.asarray(to_8bit(image, 3))
    assert tuple(pixels[0, 0]) == seen
    assert (pixels[1:] == 255).all()


def test_half_transparent_is_half_white() -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert abs(int(np.asarray(to_8bit(image, 3))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(
    ("mode", "colour", "kind"),
    [("CMYK", (0, 255, 255, 0), "JPEG"), ("L", 76, "PNG"), ("1", 1, "PNG"), ("P", 0, "GIF")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_comes_out_grey_or_rgb(
    mode: str, colour: object, kind: str, channels: int
) -> None:
    content = file_of(Image.new(mode, (30, 20), colour), kind)
    stored = prepare_image(content, Settings(size=8), channels=channels)
    image = Image.open(BytesIO(stored.data))
    assert stored[1:] == ("png", len(content), 30, 20)
    assert (image.mode, image.size) == ({1: "L", 3: "RGB"}[channels], (8, 8))
    if mode == "CMYK" and channels == 3:  # all magenta and yellow ink: red
        assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() <= 3


def test_values_of_unknown_range_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        to_8bit(Image.new("F", (4, 4)), 3)
    with pytest.raises(ValueError, match="32-bit"):
        to_8bit(Image.new("I", (4, 4), 70_000), 3)


INK = np.array([30, 200, 90, 60])  # cyan, magenta, yellow, black


def cmyk_jpeg() -> bytes:
    """As Photoshop writes it: an Adobe marker, and the ink inverted."""
    content = file_of(Image.new("CMYK", (32, 32), tuple(INK.tolist())), "JPEG", quality=100)
    assert content.count(b"Adobe") == 1
    return content


def decoded(content: bytes) -> np.ndarray:
    """The colour of an image that has one only."""
    pixels = np.asarray(to_8bit(open_image(content), 3)).astype(float)
    assert np.ptp(pixels, axis=(0, 1)).max() <= 1
    return pixels[0, 0]


def test_adobes_inverted_cmyk() -> None:
    assert np.abs(decoded(cmyk_jpeg()) - (255 - INK[:3]) * (255 - INK[3]) / 255).max() <= 2


def test_ycck() -> None:
    """The same file, its marker saying that the first three of its values are Y, Cb, Cr."""
    content = bytearray(cmyk_jpeg())
    content[content.index(b"Adobe") + 11] = 2
    y, cb, cr, k = 255 - INK
    inverted = np.array(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y]
    )
    inverted[2] += 1.772 * (cb - 128)
    red_green_blue = (255 - inverted.clip(0, 255)) * k / 255
    assert np.abs(decoded(bytes(content)) - red_green_blue).max() <= 2


def test_cmyk_without_adobes_marker_is_inverted_too() -> None:
    """As Pillow takes it, and with it all of the field."""
    content = cmyk_jpeg()
    start = content.index(b"Adobe") - 4
    content = content[:start] + content[start + 16 :]
    assert np.array_equal(decoded(content), decoded(cmyk_jpeg()))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF"])
def test_the_suffix_says_nothing(kind: str) -> None:
    """Files are known by their content alone: nothing else is given."""
    content = file_of(Image.new("RGB", (9, 9), "white"), kind)
    stored = prepare_image(content, Settings(size=9, encode="raw"), channels=3)
    assert stored.data == b"\xff" * 243


def test_raw_is_the_pixels_and_webp_is_lossless() -> None:
    pixels = noise(20, 20)
    assert encode_image(Image.fromarray(pixels), "raw") == (pixels.tobytes(), "raw")
    data, kind = encode_image(Image.fromarray(pixels), "webp")
    stored = Image.open(BytesIO(data))
    assert (kind, stored.format) == ("webp", "WEBP")
    assert np.array_equal(np.asarray(stored), pixels)


KINDS = {
    "AVIF": "avif",
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG": "jpg",
    "JPEG2000": "jp2",
    "PNG": "png",
    "PPM": "ppm",
    "TIFF": "tif",
    "WEBP": "webp",
}


@pytest.mark.parametrize("kind", KINDS)
def test_keep_gives_the_file_back(kind: str) -> None:
    content = file_of(Image.new("RGB", (30, 20), "red"), kind)
    stored = prepare_image(content, Settings(size=None, encode="keep"), channels=3)
    assert stored == (content, KINDS[kind], len(content), 30, 20)
    with pytest.raises(OSError, match=r".*"):
        prepare_image(content[:40], Settings(size=None, encode="keep"), channels=3)


def test_a_camera_file_of_two_pictures_is_a_jpeg() -> None:
    content = BytesIO()
    image = Image.new("RGB", (30, 20), "red")
    image.save(content, "MPO", save_all=True, append_images=[image])
    stored = prepare_image(content.getvalue(), Settings(size=None, encode="keep"), channels=3)
    assert stored.kind == "jpg"


def bomb(side: int) -> bytes:
    """A PNG of few bytes that says it is `side` x `side`."""
    content = bytearray(file_of(Image.new("L", (1, 1)), "PNG"))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("side", [17_000, 40_000])
@pytest.mark.parametrize("encode", ["png", "keep"])
def test_decompression_bombs_are_refused(side: int, encode: str) -> None:
    """Also between once and twice Pillow's limit, where Pillow itself only warns."""
    with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
        prepare_image(bomb(side), Settings(size=8, encode=encode), channels=3)


@pytest.mark.parametrize("encode", ["png", "keep"])
def test_a_giant_is_taken_once_it_is_said_to_be_honest(encode: str) -> None:
    content = file_of(Image.new("L", (30, 40)), "PNG")
    settings = Settings(None if encode == "keep" else 8, encode=encode, max_pixels=1199)
    refused = store_image(lambda: content, settings, 3)
    assert isinstance(refused, str)
    assert refused.startswith("more than 1199 pixels")
    taken = store_image(lambda: content, replace(settings, max_pixels=1200), 3)
    assert isinstance(taken, Stored)
    assert (taken.original_width, taken.original_height) == (30, 40)


def test_any_flipped_bit_of_a_png_is_found() -> None:
    content = file_of(Image.fromarray(noise(12, 12)), "PNG")
    for place in range(0, len(content) - 12, 7):  # all but the end, which holds nothing
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises((OSError, SyntaxError, ValueError)):
            prepare_image(bytes(damaged), Settings(size=8), channels=3)


def test_programs_are_not_images() -> None:
    """Pillow would hand PostScript to Ghostscript."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(UnidentifiedImageError):
        open_image(content)


@pytest.mark.parametrize("crop", ["adm", "tarflow"])
def test_threads_are_refused(crop: str) -> None:
    """With its short side at 256 this one would have a hundred times the pixels of a poster."""
    thread = file_of(Image.new("L", (1, 60_000)), "PNG")
    with pytest.raises(ValueError, match="too narrow to be resized: 1x60000"):
        prepare_image(thread, Settings(size=256, crop=crop), channels=3)
    assert prepare_image(
        thread, Settings(size=8, crop=crop, encode="raw"), channels=3
    ).data == bytes(192)
