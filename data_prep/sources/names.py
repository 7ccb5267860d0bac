"""What the names of files, folders and classes tell, and how they are told of."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from pathlib import Path

from data_prep.images import SUFFIXES
from tarflow_dist.errors import UserError

SPLITS = ("train", "val")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "test", "testing"),
}
"""What the splits are called in other people's sets; the first that is there is it."""
UNCONDITIONAL = "images"
"""The one class of a set that has none."""
MAX_CLASSES = 1 << 20


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


def check_distinct(names: Iterable[str], what: str) -> None:
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


def names_by_label(seen: Set[tuple[int, str]], count: int) -> list[str] | None:
    """The names of `count` labels, if in the pairs that were `seen` each label has one, its own."""
    pairs = sorted(seen)
    names = [name for _, name in pairs]
    each_has_one = [label for label, _ in pairs] == list(range(count))
    return names if each_has_one and all(names) and len(set(names)) == count else None


def wnids_by_label(seen: Set[tuple[int, str]], count: int) -> list[str] | None:
    """As `names_by_label`, if they are wnids in sorted order."""
    names = names_by_label(seen, count) or []
    sound = names == sorted(names) and all(re.fullmatch(r"n\d{8}", name) for name in names)
    return names if names and sound else None


def shuffle_key(seed: int, purpose: str, name: str) -> bytes:
    """16 bytes. Sorting names by this shuffles them, each in its place whatever else is among
    them."""
    return blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=16).digest()
