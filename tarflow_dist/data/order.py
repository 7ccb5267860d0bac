"""The order of images: one pure function of (seed, epoch), the same for every shard format."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np


class ImageOrder:
    """The images of a run: its epochs one after another, each image once an epoch.

    In each epoch the shards are shuffled and put into windows of `window` shards, and the images of
    a window are shuffled together, so that reading needs no more than `window` shards at hand. A
    position in the run is a number of images; global batches are cut from it anywhere, also over
    the end of an epoch.

    Args:
        shard_sizes: images in each shard. An image's index counts through them in order.
        seed: any integer.
        window: shards whose images are shuffled together, at least 1.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window: int):
        assert window >= 1
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed, self._window = seed, window
        self._total = int(self._sizes.sum())
        assert self._total > 0
        # a batch seldom touches more than the end of one epoch and the start of the next
        self._recent = lru_cache(maxsize=2)(self.epoch_permutation)

    def __len__(self) -> int:
        """Images in an epoch."""
        return self._total

    def epoch_permutation(self, epoch: int) -> np.ndarray:
        """(len(self),) int64: the indexes of all images, in the epoch's order."""
        words = self._random_words(epoch, len(self._sizes) + self._total)
        for_shards, for_images = np.split(words, [len(self._sizes)])
        shards = np.argsort(for_shards, kind="stable")
        sizes = self._sizes[shards]
        ends = np.cumsum(sizes)
        # shard after shard in the new order: an image's index is its shard's start plus its place
        indexes = np.arange(self._total) + np.repeat(self._starts[shards] - (ends - sizes), sizes)
        windows = np.repeat(np.arange(len(shards)) // self._window, sizes)
        return indexes[np.lexsort((for_images, windows))]

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` images from `position` on: epochs and indexes, (count,) int64 each."""
        epochs, places = np.divmod(np.arange(position, position + count), self._total)
        indexes = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indexes[here] = self._recent(int(epoch))[places[here]]
        return epochs, indexes

    def _random_words(self, epoch: int, count: int) -> np.ndarray:
        """uint64 numbers. Raw words, because numpy keeps those the same from version to version,
        and promises nothing of the kind for its shuffles."""
        digest = blake2b(f"{self._seed}/order/{epoch}".encode(), digest_size=16).digest()
        return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
