"""Which files of a source are train and which val, or how val is drawn where it has none."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.sources.base import Group, readable, shuffle_key
from tarflow_dist.errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "test", "testing"),
}
"""What the splits are called in other people's sets; the first that is there is it."""


def find_splits(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Of files and folders whose names have a split's name as a word (imagenet1k-validation-00.tar,
    train/0.tar): those of each split that is there, and the others."""
    words = {name: set(re.split(r"[-_./\\ ]+", name.lower())) for name in sorted(names)}
    splits = {}
    for split, known in SPLIT_NAMES.items():
        alike = ([name for name in words if called in words[name]] for called in known)
        if found := next(filter(None, alike), []):
            splits[split] = found
    used = {name for found in splits.values() for name in found}
    return splits, [name for name in words if name not in used]


@dataclass(frozen=True)
class HoldOut:
    """How val is drawn where a source has none."""

    fraction: float
    """Of each class; at least one image where there are two."""
    seed: int

    def draw(self, names: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Which of the images of these names and labels are val's: bool.

        Raises:
            UserError: there are none.
        """
        val = np.zeros(len(names), bool)
        order = np.argsort(labels, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            key = {i: shuffle_key(self.seed, "split", readable(names[i])) for i in places.tolist()}
            count = min(max(1, round(len(key) * self.fraction)), len(key) - 1)
            val[sorted(key, key=key.__getitem__)[:count]] = True
        if not val.any():
            raise UserError("no class has two images, so val would be empty: give more images")
        return val

    def split(self, groups: list[Group]) -> list[Group]:
        """Groups of train alone as groups of train and val."""
        names = [group.prefix + name for group in groups for name in group.names]
        labels = np.concatenate([np.broadcast_to(g.label, len(g.names)) for g in groups])
        val = self.draw(names, labels)
        halves = []
        for group in groups:
            mine, val = val[: len(group.names)], val[len(group.names) :]
            halves += [group.part("train", ~mine), group.part("val", mine)]
        return halves
