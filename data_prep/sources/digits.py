"""The built-in source."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from data_prep.sources.base import Item, Place


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, 1,500 to train and 297 to validate."""

    layout = name = "digits"
    classes = tuple("0123456789")
    class_names = None
    channels = 1
    size = 8
    path = Path()
    in_blocks = False
    passed_over: Mapping[str, int] = MappingProxyType({})
    notes = ()

    def __init__(self, *, seed: int):
        from sklearn.model_selection import train_test_split

        _, self._labels = _digits()
        _, val = train_test_split(
            np.arange(len(self)), test_size=297, stratify=self._labels, random_state=seed
        )
        self._val = frozenset(val.tolist())

    def __len__(self) -> int:
        return len(self._labels)

    def items(self) -> Iterator[Item]:
        for i in range(len(self)):
            split = "val" if i in self._val else "train"
            yield Item(
                split, int(self._labels[i]), f"digits/{i:04d}", Place("digits", "", offset=i)
            )

    def fingerprint(self) -> str:
        return " ".join(map(str, sorted(self._val)))


def read_digit(file: Path, place: Place) -> np.ndarray:
    return _digits()[0][place.offset]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 (1797, 8, 8), and labels."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), labels
