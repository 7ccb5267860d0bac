"""The built-in source."""

from functools import cache
from pathlib import Path

import numpy as np

from data_prep.sources.base import Group, Place, Source
from data_prep.sources.names import SPLITS


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, 1,500 to train and 297 to validate."""

    channels = 1
    size = 8
    path = Path("/digits")  # which is nowhere, and names the set

    def __init__(self, *, seed: int):
        from sklearn.model_selection import train_test_split

        _, labels = _digits()
        numbers = np.arange(len(labels))
        halves = train_test_split(numbers, test_size=297, stratify=labels, random_state=seed)
        groups = []
        for split, half in zip(SPLITS, map(np.sort, halves), strict=True):
            names = [f"{number:04d}" for number in half]
            parts = np.stack([half, np.zeros_like(half)], axis=1)
            group = Group(split, labels[half], "digits/", self.path, names, parts, reader="digits")
            groups.append(group)
        super().__init__("digits", self.path, [*"0123456789"], groups)


def read_digit(file: Path, place: Place) -> np.ndarray:
    return _digits()[0][place.offset]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 (1797, 8, 8), and labels."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), labels
