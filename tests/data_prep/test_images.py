"""Decode, crop and encode against second implementations and torchvision."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from torchvision import transforms

from data_prep.images import adm_crop, encode, open_image, prepare_image, tarflow_crop, to_8bit

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
    stored = Image.open(BytesIO(encode(original, "png")))
    assert np.array_equal(np.asarray(stored), pixels)
    assert stored.info == {}


def test_jpeg_is_close_and_not_subsampled() -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    stored = Image.open(BytesIO(encode(Image.fromarray(smooth), "jpeg")))
    assert stored.format == "JPEG"
    assert np.abs(np.asarray(stored).astype(int) - smooth).max() <= 6
    assert JpegImagePlugin.get_sampling(stored) == 0  # 4:4:4


def test_sixteen_bits_become_eight() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = open_image(file_of(Image.fromarray(values), "PNG"))
    expected = np.round(values / 65535 * 255)
    assert np.array_equal(np.asarray(to_8bit(image, 1)), expected)
    assert np.array_equal(np.asarray(to_8bit(image, 3))[..., 2], expected)


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
    data = prepare_image(content, size=8, channels=channels, crop="adm", encoding="png")
    image = Image.open(BytesIO(data))
    assert (image.mode, image.size) == ({1: "L", 3: "RGB"}[channels], (8, 8))
    if mode == "CMYK" and channels == 3:  # all magenta and yellow ink: red
        assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() <= 3


def test_values_of_unknown_range_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        to_8bit(Image.new("F", (4, 4)), 3)
    with pytest.raises(ValueError, match="32-bit"):
        to_8bit(Image.new("I", (4, 4), 70_000), 3)
