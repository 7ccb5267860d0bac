"""Which image goes where: the order, and how it is cut into shards."""

from collections.abc import Iterator

import numpy as np

from data_prep.sources import SPLITS, shuffle_key
from data_prep.staging import Staging
from tarflow_dist.errors import UserError

# All that is held of an image at once, 42 bytes; the rest stays in the staging journal, on disk.
PLACED = np.dtype(
    [
        ("line", "i8"),  # where its line begins in the journal
        ("length", "i4"),  # of that line
        ("key", "u8", 2),  # that it is sorted by
        ("bytes", "i8"),
        ("label", "i4"),
        ("split", "i1"),  # a position in SPLITS
        ("bad", "?"),
    ]
)


def place_images(images: Staging, seed: int) -> np.ndarray:
    """(images.done,) of PLACED, in the source's order."""

    def placed() -> Iterator[tuple[object, ...]]:
        for line, length, row in images.journal.places():
            key = tuple(np.frombuffer(shuffle_key(seed, "order", row["source"]), ">u8").tolist())
            split, bad = SPLITS.index(row["split"]), row["reason"] is not None
            yield line, length, key, row["bytes"], row["label"], split, bad

    return np.fromiter(placed(), PLACED, images.done)


def cut_shards(placed: np.ndarray, split: str, shard_bytes: int) -> list[np.ndarray]:
    """Shuffles the images of a split and cuts them into shards: the positions in `placed` of those
    in each.

    Raises:
        UserError: there are none.
    """
    chosen = np.flatnonzero((placed["split"] == SPLITS.index(split)) & ~placed["bad"])
    if not len(chosen):
        raise UserError(f"no image of {split} could be read")
    high, low = placed["key"][chosen].T
    chosen = chosen[np.lexsort((low, high))]
    ends = np.cumsum(placed["bytes"][chosen])
    cuts, end = [], 0
    while end < len(chosen):
        room = shard_bytes + (ends[end - 1] if end else 0)
        end = max(end + 1, int(np.searchsorted(ends, room, side="right")))
        cuts.append(end)
    return np.split(chosen, cuts[:-1])
