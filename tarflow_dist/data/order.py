"""The order of images: one pure function of (seed, epoch), the same for every shard format."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np


class ImageOrder:
    """The images of a run: its epochs one after another, each image once an epoch.

    A position in the run is a number of images; global batches are cut from it anywhere, also over
    the end of an epoch. The set, shard after shard, is cut into groups of as many images (to one),
    and a run goes round the groups: the image at position p is of group p mod `groups`. So a batch
    has as many of each, and who reads for some groups alone needs only their shards.

    In each epoch the shards of a group (of those that it shares with the next group, its part) are
    shuffled and put into windows, and the images of a window are shuffled together, so that reading
    needs no more than `shards_at_hand`.

    Args:
        shard_sizes: images in each shard, at least 1. An image's index counts through them in
            order.
        seed: any integer.
        window: shards whose images are shuffled together, over all groups, at least 1; a group
            always has one.
        groups: at least 1.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window: int, groups: int = 1):
        assert window >= 1
        assert groups >= 1
        self._shard_ends = np.cumsum(np.asarray(shard_sizes, np.int64))
        self._total = int(self._shard_ends[-1])
        self._seed, self._groups = seed, groups
        self._window = -(-window // groups)
        # a batch seldom touches more than the end of one epoch and the start of the next
        self._recent = lru_cache(maxsize=2)(self.epoch_permutation)

    def __len__(self) -> int:
        """Images in an epoch."""
        return self._total

    @property
    def shards_at_hand(self) -> int:
        """That are read from at a time, for all groups, each counted where two share it."""
        return self._window * self._groups

    def epoch_permutation(self, epoch: int) -> np.ndarray:
        """(len(self),) int64: the indexes of all images, in the epoch's order."""
        place_groups = self._group(epoch * self._total + np.arange(self._total))
        group_ends = np.cumsum(np.bincount(place_groups, minlength=self._groups))
        # the parts of shards that lie in one group
        ends = np.union1d(self._shard_ends, group_ends)
        starts = np.concatenate([[0], ends[:-1]])
        groups = np.searchsorted(group_ends, starts, side="right")

        words = self._random_words(epoch, len(ends) + self._total)
        for_parts, for_images = np.split(words, [len(ends)])
        parts = np.lexsort((for_parts, groups))
        starts, sizes, groups = starts[parts], (ends - starts)[parts], groups[parts]
        # part after part in the new order: an image's index is its part's start plus its place
        indexes = np.arange(self._total) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
        place_in_group = np.arange(len(parts)) - np.searchsorted(groups, groups)
        windows = groups * len(parts) + place_in_group // self._window
        shuffled = indexes[np.lexsort((for_images, np.repeat(windows, sizes)))]

        permutation = np.empty_like(shuffled)
        permutation[np.argsort(place_groups, kind="stable")] = shuffled
        return permutation

    def share(self, position: int, count: int, *, rank: int, world_size: int) -> np.ndarray:
        """(count / world_size,) int64: which of the `count` positions from `position` on are
        `rank`'s. Ranks split the groups in order; two have one together where they must."""
        positions = np.arange(position, position + count)
        by_group = np.argsort(self._group(positions), kind="stable")
        return np.split(positions[by_group], world_size)[rank]

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images at `positions`, (n,) int64: epochs and indexes, (n,) int64 each."""
        epochs, places = np.divmod(positions, self._total)
        indexes = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indexes[here] = self._recent(int(epoch))[places[here]]
        return epochs, indexes

    def _group(self, positions: np.ndarray) -> np.ndarray:
        return positions % self._groups

    def _random_words(self, epoch: int, count: int) -> np.ndarray:
        """uint64 numbers. Raw words, because numpy keeps those the same from version to version,
        and promises nothing of the kind for its shuffles."""
        digest = blake2b(f"{self._seed}/order/{epoch}".encode(), digest_size=16).digest()
        return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
