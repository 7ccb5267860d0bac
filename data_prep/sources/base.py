"""What a source of images is: groups of images, each with its place."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.sources.names import check_distinct, readable, set_name, shuffle_key
from tarflow_dist.errors import UserError

Content = bytes | np.ndarray | None
"""A file's bytes, or pixels: uint8, (H, W) or (H, W, 3). None is an image that the source names and
has not."""


class Place(NamedTuple):
    """Where an image lies. Reading it is left to who needs it: mostly another process."""

    reader: str
    """How it is read: a key of `sources.READERS`, then its arguments, between spaces."""
    file: str
    """The image's file, or the one that it is in, from the source's `path` on."""
    block: int = 0
    """What of the file is read at once, where that is more than one image."""
    offset: int = 0
    """Of the image in that: in bytes, or rows."""
    size: int = 0
    """In bytes."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image before it is read."""

    split: str
    label: int
    name: str
    """Where it came from, such as train/n01440764/n01440764_18.JPEG; it also keys the image's
    place in the order, so an image has the same name in every layout."""
    place: Place


@dataclass(frozen=True)
class Group:
    """Images that lie together, in a folder or a file. Compact: a name is a text, without objects
    around it."""

    split: str
    label: int | np.ndarray
    """Of all, or (len(names),) int64."""
    prefix: str
    """Of the items' names."""
    where: Path
    names: list[str]
    """Of the files in the folder `where`, or of the images in the file."""
    parts: np.ndarray | None = None
    """(len(names), 2) int64: offset and size of each in the file `where`, as in their places."""
    absent: frozenset[str] = frozenset()
    """Those of `names` that are not there."""
    reader: str = "file"
    """As in their places; `file` and `part` are files, whose names must differ."""
    block: int = 0
    """As in their places."""
    in_block: bool = False
    """Whether all of them must be read for one."""

    def part(self, split: str, chosen: np.ndarray) -> "Group":
        """Those that are `chosen`, (len(names),) bool, as of `split`."""
        label = self.label if isinstance(self.label, int) else self.label[chosen]
        names = [self.names[i] for i in np.flatnonzero(chosen).tolist()]
        parts = None if self.parts is None else self.parts[chosen]
        return replace(self, split=split, label=label, names=names, parts=parts)

    def items(self, path: Path) -> Iterator[Item]:
        """Of a source at `path`."""
        where = str(self.where.relative_to(path))
        where = "" if where == "." else where
        folder = f"{where}/" if where else ""
        for i, name in enumerate(self.names):
            if self.parts is not None:
                place = Place(self.reader, where, self.block, *self.parts[i].tolist())
            else:
                place = Place("absent" if name in self.absent else self.reader, folder + name)
            label = self.label if isinstance(self.label, int) else int(self.label[i])
            yield Item(self.split, label, f"{self.prefix}{readable(name)}", place)


class Images(NamedTuple):
    """The images in a folder, or in a tar or zip."""

    where: Path
    names: list[str]
    """Of the files, sorted: in the folder `where`, or in the archive."""
    passed_over: Counter[str]
    """What else lies there, by its kind."""
    parts: np.ndarray | None = None
    """(len(names), 2) int64: offset and size of each in the archive."""
    absent: frozenset[str] = frozenset()
    """Those of the names that are links to nothing."""

    def group(self, split: str, label: int | np.ndarray, prefix: str) -> Group:
        reader = "file" if self.parts is None else "part"
        return Group(
            split, label, prefix, self.where, self.names, self.parts, self.absent, reader=reader
        )


class Source:
    """Images in a layout that users have, and where each of them lies. The order in which they are
    stored is made by the plan, so a source may give them as they lie. A layout is a subclass that
    finds the groups.

    Attributes:
        name: for file names: letters, digits, - and _.
        channels: of the images once prepared: 1 for grey, 3 for RGB.
        in_blocks: whether many images must be read for one: the blocks of their places.
        held_out_note: what `hold_out` adds to the notes; None in a layout that always has val.
        held_out_by_name: whether the images' names decide on that, or their positions.

    Args:
        layout: a key of `sources.LAYOUTS`, or digits.
        path: the folder that places count from, or the one file.
        classes: ImageNet's wnids, or other class names; a label is a position in them.
        class_names: what people call the classes, where the layout has it beside `classes`.
        passed_over: how many files, by their kind, are no images of the set.
        notes: what of the layout a user may not expect.

    Raises:
        UserError: two of the images have one name.
    """

    channels = 3
    held_out_note: str | None = None
    held_out_by_name = True

    def __init__(
        self,
        layout: str,
        path: Path,
        classes: Sequence[str],
        groups: list[Group],
        class_names: Sequence[str] | None = None,
        *,
        passed_over: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ):
        self.layout, self.path, self.name = layout, path, set_name(path, classes)
        self.classes, self.class_names = classes, class_names
        self.passed_over, self.notes = +Counter(passed_over or {}), [*notes]
        files = (group for group in groups if group.reader in ("file", "part"))
        for (prefix, _), alike in groupby(files, lambda group: (group.prefix, group.where)):
            names = chain.from_iterable(group.names for group in alike)
            check_distinct(names, f"{path}: {prefix} has two images")
        self.groups = groups
        self.in_blocks = any(group.in_block for group in groups)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether `path` holds this layout, by what is found there."""
        return False

    def __len__(self) -> int:
        return sum(len(group.names) for group in self.groups)

    def hold_out(self, fraction: float, seed: int) -> None:
        """Draws val from train, if there is none: `fraction` of each class, at least one image
        where there are two.

        Raises:
            UserError: val would be empty.
        """
        if self.held_out_note is None or any(group.split == "val" for group in self.groups):
            return
        if self.held_out_by_name:
            names = [group.prefix + readable(name) for group in self.groups for name in group.names]
        else:
            names = [str(position) for position in range(len(self))]
        labels = np.concatenate([np.broadcast_to(g.label, len(g.names)) for g in self.groups])
        val = np.zeros(len(names), bool)
        order = np.argsort(labels, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            key = {i: shuffle_key(seed, "split", names[i]) for i in places.tolist()}
            count = min(max(1, round(len(key) * fraction)), len(key) - 1)
            val[sorted(key, key=key.__getitem__)[:count]] = True
        if not val.any():
            raise UserError("no class has two images, so val would be empty: give more images")
        halves = []
        for group in self.groups:
            mine, val = val[: len(group.names)], val[len(group.names) :]
            halves += [group.part("train", ~mine), group.part("val", mine)]
        self.groups = halves
        self.notes += [self.held_out_note] if self.held_out_note else []

    def items(self) -> Iterator[Item]:
        """All images, always in the same order; they are not read here."""
        for group in self.groups:
            yield from group.items(self.path)

    def fingerprint(self) -> str:
        """Another one for other images, as far as places, names and labels tell."""
        digest = blake2b(digest_size=16)
        for group in self.groups:
            where = str(group.where.absolute())
            labels = group.label if isinstance(group.label, int) else group.label.tolist()
            about = [group.split, str(labels), group.prefix, where, *group.names]
            if group.reader not in ("file", "part"):
                about += [group.reader, str(group.block)]
            digest.update("\0".join(about).encode(errors="surrogateescape"))
            digest.update(b"" if group.parts is None else group.parts.tobytes())
        return digest.hexdigest()
