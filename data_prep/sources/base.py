"""What a source of images is, and what the layouts have in common."""

import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import IO, NamedTuple, Protocol, TypeVar
from zipfile import ZIP_STORED, BadZipFile, ZipInfo

import numpy as np

from data_prep.images import SUFFIXES
from tarflow_dist.errors import UserError
from tarflow_dist.files import NotRegularError

SPLITS = ("train", "val")
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a file in a zip: signature, lengths of its name and of what follows that."""
T = TypeVar("T")


Content = bytes | np.ndarray | None
"""A file's bytes, or pixels: uint8, (H, W) or (H, W, 3). None is an image that the source names and
has not."""
WAITS = (0.5, 2.0, 8.0)
"""Seconds before something that the system refused is tried again."""


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


def patiently(read: Callable[[], T], file: Path) -> T:
    """What `read` gives. What the system refuses may be there in a moment: it is tried again after
    each of WAITS.

    Raises:
        NotRegularError: it is no file.
        UserError: it still can't be read.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except NotRegularError:
            raise
        except OSError as error:
            if wait is None:
                raise UserError(
                    f"can't read {readable(str(file))} ({error.strerror}), after "
                    f"{len(WAITS)} more attempts: once it can be read, the same command goes on"
                ) from error
            time.sleep(wait)
    raise AssertionError


def zip_part(stream: IO[bytes], member: ZipInfo) -> tuple[int, int]:
    """Offset and size of a file in the zip `stream`, which the zip's index alone doesn't tell.

    Raises:
        ValueError: it is compressed or locked.
        BadZipFile: it isn't there.
    """
    if member.compress_type != ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{member.filename} is compressed or locked: unpack it, give the folder")
    stream.seek(member.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise BadZipFile(f"{member.filename} is not where the index says")
    return member.header_offset + LOCAL_HEADER.size + name + extra, member.file_size


@dataclass(frozen=True, slots=True)
class Item:
    """One image before it is read."""

    split: str
    label: int
    name: str
    """Where it came from, such as train/n01440764/n01440764_18.JPEG; it also keys the image's
    place in the order, so an image has the same name in every layout."""
    place: Place


class Source(Protocol):
    """Images in a layout that users have. The order in which they are stored is made by the plan,
    so a source may give them as they lie."""

    layout: str
    """A key of `sources.LAYOUTS`, or digits."""
    name: str
    """For file names: letters, digits, - and _."""
    channels: int
    """Of the images once prepared: 1 for grey, 3 for RGB."""
    path: Path
    """The folder that places count from, or the one file."""
    in_blocks: bool
    """Whether many images must be read for one: the blocks of their places."""

    @property
    def passed_over(self) -> Mapping[str, int]:
        """How many files, by their kind, are no images of the set."""

    @property
    def notes(self) -> Sequence[str]:
        """What of the layout a user may not expect."""

    @property
    def classes(self) -> Sequence[str]:
        """ImageNet's wnids, or other class names; a label is a position in them."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """What people call the classes, where the layout has it beside `classes`."""

    def __len__(self) -> int: ...

    def items(self) -> Iterator[Item]:
        """All images, always in the same order; they are not read here."""

    def fingerprint(self) -> str:
        """Another one for other images, as far as places, names and labels tell."""


@dataclass(frozen=True)
class Group:
    """Images that lie together, in a folder or an archive. Compact: a name is a text, without
    objects around it."""

    split: str
    label: int | np.ndarray
    """Of all, or (len(names),) int64."""
    prefix: str
    """Of the items' names."""
    where: Path
    names: list[str]
    """Of the files: in the folder `where`, or in the archive."""
    parts: np.ndarray | None = None
    """(len(names), 2) int64: offset and size of each in the archive `where`."""
    absent: frozenset[str] = frozenset()
    """Those of `names` that are not there."""

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
                place = Place("part", where, 0, *self.parts[i].tolist())
            else:
                place = Place("absent" if name in self.absent else "file", folder + name)
            label = self.label if isinstance(self.label, int) else int(self.label[i])
            yield Item(self.split, label, f"{self.prefix}{readable(name)}", place)


class Grouped:
    """A source that knows beforehand where each image lies.

    Raises:
        UserError: two of the images have one name.
    """

    channels = 3
    in_blocks = False

    def __init__(
        self,
        layout: str,
        path: Path,
        classes: Sequence[str],
        groups: list[Group],
        class_names: Sequence[str] | None = None,
        *,
        passed_over: Mapping[str, int],
        notes: Sequence[str] = (),
    ):
        self.layout, self.path, self.name = layout, path, set_name(path, classes)
        self.classes, self.class_names = classes, class_names
        self.passed_over, self.notes = passed_over, notes
        self.groups = groups
        for prefix, alike in groupby(groups, lambda group: (group.prefix, group.where)):
            names = [name for group in alike for name in group.names]
            check_distinct(names, f"{path}: {prefix[0]} has two images")

    def __len__(self) -> int:
        return sum(len(group.names) for group in self.groups)

    def items(self) -> Iterator[Item]:
        for group in self.groups:
            yield from group.items(self.path)

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for group in self.groups:
            where = str(group.where.absolute())
            labels = group.label if isinstance(group.label, int) else group.label.tolist()
            about = [group.split, str(labels), group.prefix, where, *group.names]
            digest.update("\0".join(about).encode(errors="surrogateescape"))
            digest.update(b"" if group.parts is None else group.parts.tobytes())
        return digest.hexdigest()


def is_image_name(name: str) -> bool:
    """Whether a file is to be an image, by its name; hidden files are not."""
    path = Path(name)
    return not path.name.startswith(".") and path.suffix.lower() in SUFFIXES


def kind_of(name: str) -> str:
    """What a file that is no image is counted as."""
    path = Path(name)
    if path.name.startswith("."):
        return "hidden"
    return readable(path.suffix.lower()) or "without a suffix"


def readable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 become replacement characters."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def say_passed_over(kinds: Mapping[str, int]) -> str:
    """Such as: 12 files passed over: 9 .txt, 3 .pdf."""
    total = sum(kinds.values())
    by_count = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    each = listed([f"{count} {kind}" for kind, count in by_count], shown=10)
    return f"{total} file{'s' if total != 1 else ''} passed over: {each}"


def check_distinct(names: Sequence[str], what: str) -> None:
    """Raises `UserError` if two of `names` are one to a reader; `what` says whose they are."""
    seen: set[str] = set()
    for name in map(readable, names):
        if name in seen:
            raise UserError(
                f"{what} that are both called {name}, as far as their names are UTF-8: rename one"
            )
        seen.add(name)


def set_name(path: Path, classes: Sequence[str]) -> str:
    """What the files of a set are named after: ImageNet (if all of it, as timm has it), or else the
    folder `path`, with nothing in it that a file name can't have."""
    if all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return "imagenet1k" if len(classes) == 1000 else "imagenet"
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.resolve().name) or "images"


UNCONDITIONAL = "images"
"""The one class of a set that has none."""


MAX_CLASSES = 1 << 20


def wnids_by_label(seen: Mapping[int, set[str]], count: int) -> list[str] | None:
    """The wnids of `count` labels, if in what was seen of it each has its own, in sorted order."""
    wnids = [wnid for label in sorted(seen) for wnid in sorted(seen[label])]
    sound = len(wnids) == count and wnids == sorted(set(wnids))
    return wnids if sound and all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids) else None


def shuffle_key(seed: int, purpose: str, name: str) -> bytes:
    """16 bytes. Sorting names by this shuffles them, each in its place whatever else is among
    them."""
    return blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=16).digest()
