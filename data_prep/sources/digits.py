"""The built-in source."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from data_prep.sources.base import Item


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, 1,500 to train and 297 to validate."""

    layout = name = "digits"
    classes = tuple("0123456789")
    class_names = None
    channels = 1
    size = 8
    passed_over: Mapping[str, int] = MappingProxyType({})
    notes = ()

    def __init__(self, *, seed: int):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        values, self._labels = load_digits(return_X_y=True)
        self._pixels = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
        _, val = train_test_split(
            np.arange(len(values)), test_size=297, stratify=self._labels, random_state=seed
        )
        self._val = frozenset(val.tolist())

    def __len__(self) -> int:
        return len(self._pixels)

    def items(self, start: int = 0) -> Iterator[Item]:
        for i in range(start, len(self)):
            split = "val" if i in self._val else "train"
            yield Item(split, int(self._labels[i]), f"digits/{i:04d}", self._pixels[i])

    def fingerprint(self) -> str:
        return " ".join(map(str, sorted(self._val)))
