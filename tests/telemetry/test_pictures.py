"""What is written on pictures can be read."""

import numpy as np
from PIL import Image, ImageDraw

from tarflow_dist.telemetry.pictures import font


def drawn(text: str) -> np.ndarray:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((4, 4), text, 255, font(24))
    return np.asarray(image)


def test_letters_of_many_languages_differ_from_what_a_font_lacks() -> None:
    missing = drawn("\U0001fae8")
    for letter in "üéñßøžЖΩ":
        assert drawn(letter).any()
        assert not np.array_equal(drawn(letter), missing)
