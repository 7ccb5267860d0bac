"""Arrow tables of images and labels, as Hugging Face's datasets have them."""

import json
import re
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.sources.base import MAX_CLASSES, Item, Place, set_name, wnids_by_label
from data_prep.sources.splits import HoldOut
from tarflow_dist.errors import UserError

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
# imagenet-1k's paths: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG
WNID_PATH = re.compile(r"^(?:.*/)?([^/]+)_(n\d{8})(\.\w+)$")


class Part(NamedTuple):
    """Rows that are read at once."""

    split: str
    file: Path
    number: int
    """Of the part in its file."""
    schema: Any
    read: Callable[[list[str]], Any]
    """The table of these columns; NAME.path is a part of one."""


class Columns(NamedTuple):
    """Which of a table's columns hold what."""

    image: str
    label: str
    has_path: bool
    """Whether the images have paths."""


class Tables:
    """Rows of an image, the file's bytes or a struct of `bytes` and perhaps `path`, and its label,
    an integer; rows whose label is -1 or null are left out. Labels stay as they are. Classes are
    the wnids in the paths, where each label has its own in sorted order (as in imagenet-1k), or
    else ClassLabel's names, or else the numbers.

    Paths and labels are read here. A subclass sets `layout`, and what `parts` needs before it calls
    this constructor.

    Args:
        hold_out: how val is drawn, where no part is of it.

    Raises:
        UserError: a file is damaged, or holds no such table.
    """

    layout: str
    channels = 3
    in_blocks = False
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, hold_out: HoldOut | None = None):
        self.path = path
        try:
            labels = self._read_labels()
        except PermissionError:
            raise
        except (OSError, ValueError, TypeError, LookupError) as error:  # pyarrow's are such, too
            said = str(error).splitlines()[0]
            raise UserError(f"the {self.layout} files in {path} can't be read: {said}") from error
        self._in_val: np.ndarray | None = None
        if hold_out:
            self._in_val = hold_out.draw([str(row) for row in range(len(labels))], labels)
        self.name = set_name(path, self.classes)

    def parts(self) -> Iterator[Part]:
        """All of them, always in the same order."""
        raise NotImplementedError

    def _read_labels(self) -> np.ndarray:
        """Those of all rows that have one."""
        names: list[str] | None = None
        seen: dict[int, set[str]] = {}
        found: list[np.ndarray] = []
        digest = blake2b(digest_size=16)
        rows = 0
        for part in self.parts():
            names = names or _class_names(part.schema, table_columns(part.schema).label)
            labels, paths = _labels_and_paths(part)
            found.append(labels[labels >= 0])
            rows += len(labels)
            digest.update(repr((str(part.file.absolute()), paths, labels.tolist())).encode())
            for label, path in zip(labels.tolist(), paths, strict=True):
                match = WNID_PATH.match(path or "")
                seen.setdefault(label, set()).add(match[2] if match else "")
        seen.pop(-1, None)
        self._labelled = sum(map(len, found))  # rows that have a label
        self._fingerprint = digest.hexdigest()
        unlabelled = rows - self._labelled
        self.passed_over = {"without a label": unlabelled} if unlabelled else {}
        if not seen:
            raise ValueError("no row has a label")
        count = len(names) if names else min(max(seen) + 1, MAX_CLASSES)
        if not 0 <= min(seen) <= max(seen) < count:
            raise ValueError(f"labels go from {min(seen)} to {max(seen)}, with {count} classes")
        wnids = wnids_by_label(seen, count)
        self._has_wnids = wnids is not None
        self.classes = wnids or names or [str(n) for n in range(count)]
        self.class_names = names if wnids else None
        return np.concatenate(found)

    def __len__(self) -> int:
        return self._labelled

    def items(self) -> Iterator[Item]:
        position = 0  # in all rows that have a label
        for part in self.parts():
            labels, paths = _labels_and_paths(part)
            file = str(part.file.relative_to(self.path))
            for row in np.flatnonzero(labels >= 0).tolist():
                label = int(labels[row])
                name = self._name(paths[row], label) or f"{part.file.name}/{part.number}/{row}"
                in_val = self._in_val is not None and self._in_val[position]
                place = Place(self.layout, file, part.number, row)
                yield Item("val" if in_val else part.split, label, f"{part.split}/{name}", place)
                position += 1

    def fingerprint(self) -> str:
        return self._fingerprint

    def _name(self, path: str | None, label: int) -> str | None:
        """The image's name in the other layouts, if the path tells."""
        if path and self._has_wnids and (match := WNID_PATH.match(path)):
            return f"{match[2]}/{match[1]}{match[3]}"
        return f"{self.classes[label]}/{path}" if path else None


def _labels_and_paths(part: Part) -> tuple[np.ndarray, list[str | None]]:
    """Of each row: int64, -1 without a label; and what the image's file was called, if known."""
    columns = table_columns(part.schema)
    wanted = [f"{columns.image}.path", columns.label]
    table = part.read(wanted if columns.has_path else wanted[1:])
    labels = table[columns.label].cast("int64").fill_null(-1).to_numpy()
    if not columns.has_path:
        return labels, [None] * len(labels)
    return labels, table[columns.image].combine_chunks().field("path").to_pylist()


def image_in(column: Any, row: int) -> bytes | None:
    """The file in that row of a column of images."""
    image = column[row].as_py()
    return image["bytes"] if isinstance(image, dict) else image


def table_columns(schema: Any) -> Columns:
    """Raises `ValueError` if the columns are not those of labelled images."""
    import pyarrow.types as types

    kinds = dict(zip(schema.names, schema.types, strict=True))
    image_name = next((name for name in IMAGE_COLUMNS if name in kinds), None)
    label_name = next((name for name in LABEL_COLUMNS if name in kinds), None)
    if image_name is None or label_name is None:
        raise ValueError("there are no columns image and label")
    if not types.is_integer(kinds[label_name]):
        raise ValueError(f"the column {label_name} is {kinds[label_name]}, and not whole numbers")
    image = kinds[image_name]
    fields = {field.name: field.type for field in image} if types.is_struct(image) else {}
    content = fields.get("bytes", image)
    if not (types.is_binary(content) or types.is_large_binary(content)):
        raise ValueError(f"the column {image_name} is {image}, and not the files' bytes")
    return Columns(image_name, label_name, "path" in fields)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """ClassLabel's names, which datasets writes into the schema's metadata.

    Raises:
        ValueError: what stands in their place is something else.
    """
    about = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(about).get("info", {}).get("features", {}).get(label, {}).get("names")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError("their metadata are not as datasets writes them") from error
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    ):
        raise ValueError("their metadata have no list of names for the label")
    return names
