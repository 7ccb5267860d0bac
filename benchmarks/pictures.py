"""Pictures to measure with, the same on every machine."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 500, 375  # as most of ImageNet's


def write_photos(folder: Path, count: int, *, different: int = 400) -> list[Path]:
    """`count` JPEGs in ten classes as folder/CLASS/NUMBER.jpg, in size and detail like ImageNet's:
    dead leaves (discs of all sizes that cover one another, which have the statistics of
    photographs) in changing light, with a sensor's grain. After the first `different` ones they
    come again under other names."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        file = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < different:
            _photo(rng).save(file, quality=95)
        else:
            file.hardlink_to(files[number - different])
        files.append(file)
    return files


def _photo(rng: np.random.Generator) -> Image.Image:
    leaves = Image.new("RGB", (WIDTH, HEIGHT), "grey")
    draw = ImageDraw.Draw(leaves)
    for _ in range(600):
        radius = 4 / np.sqrt(rng.uniform(0.0004, 1))  # a density of radius^-3, up to 200 pixels
        x, y = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
        colour = tuple(rng.integers(20, 236, 3).tolist())
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    light = Image.fromarray(rng.integers(96, 256, (3, 4), dtype=np.uint8))
    light = light.resize(leaves.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(leaves.filter(ImageFilter.GaussianBlur(1)), float)
    pixels *= np.asarray(light, float)[..., None] / 255
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
