"""Parquet files as Hugging Face's datasets have them."""

import json
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.base import MAX_CLASSES, SPLITS, Item, set_name, wnids_by_label
from tarflow_dist.errors import UserError
from tarflow_dist.files import regular

# how the hub's names begin; test files have no labels
PREFIXES = {"train": ("train",), "val": ("validation", "valid", "val")}
# imagenet-1k's paths: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG
WNID_PATH = re.compile(r"^(?:.*/)?([^/]+)_(n\d{8})(\.\w+)$")


class Parquet:
    """A folder with train-*.parquet and validation-*.parquet, itself or in data/: columns `image`,
    the files' bytes, or a struct of `bytes` and perhaps `path`, and `label`, integers; rows whose
    label is -1 or null are left out. Labels stay as they are. Classes are the wnids in the paths,
    where each label has its own in sorted order (as in imagenet-1k), or else ClassLabel's names, or
    else the numbers.

    Paths and labels are read here; images later, a row group at a time.

    Raises:
        UserError: `path` is no such folder, or a file is damaged.
    """

    layout = "parquet"
    channels = 3
    notes = ()

    def __init__(self, path: Path):
        self._files = _find(path)
        if missing := [split for split in SPLITS if not self._files[split]]:
            begin = PREFIXES[missing[0]][0]
            raise UserError(f"{path} has no files {begin}-*.parquet, here or in data/")
        try:
            self._read_labels()
        except PermissionError:
            raise
        except (OSError, ValueError, TypeError, LookupError) as error:  # pyarrow's are such, too
            said = str(error).splitlines()[0]
            raise UserError(f"the parquet files in {path} can't be read: {said}") from error
        self.name = set_name(path, self.classes)

    @staticmethod
    def recognises(path: Path) -> bool:
        return any(_find(path).values())

    def _read_labels(self) -> None:
        names: list[str] | None = None
        seen: dict[int, set[str]] = {}
        self._labelled: list[int] = []  # rows of each row group that have a label
        digest = blake2b(digest_size=16)
        unlabelled = 0
        for _, file, parquet, group in self._row_groups():
            has_path = _check_columns(parquet.schema_arrow)
            names = names or _class_names(parquet.schema_arrow)
            columns = ["image.path", "label"] if has_path else ["label"]
            table = parquet.read_row_group(group, columns)
            labels = _labels(table)
            self._labelled.append(int((labels >= 0).sum()))
            unlabelled += len(labels) - self._labelled[-1]
            paths = [None] * len(labels)
            if has_path:
                paths = table["image"].combine_chunks().field("path").to_pylist()
            digest.update(repr((str(file.absolute()), paths, labels.tolist())).encode())
            for label, path in zip(labels.tolist(), paths, strict=True):
                match = WNID_PATH.match(path or "")
                seen.setdefault(label, set()).add(match[2] if match else "")
        seen.pop(-1, None)
        self._fingerprint = digest.hexdigest()
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

    def __len__(self) -> int:
        return sum(self._labelled)

    def items(self, start: int = 0) -> Iterator[Item]:
        for number, (split, file, parquet, group) in enumerate(self._row_groups()):
            if start >= self._labelled[number]:
                start -= self._labelled[number]
                continue
            try:
                table = parquet.read_row_group(group, ["image", "label"])
            except (OSError, ValueError) as error:
                said = str(error).splitlines()[0]
                raise UserError(f"{file} is damaged ({said}): fetch it again") from error
            labels = _labels(table)
            for row in np.flatnonzero(labels >= 0)[start:].tolist():
                image = table["image"][row].as_py()
                path = None
                if isinstance(image, dict):
                    image, path = image["bytes"], image.get("path")
                label = int(labels[row])
                name = self._name(path, label) or f"{file.name}/{group}/{row}"
                yield Item(split, label, f"{split}/{name}", image)
            start = 0

    def fingerprint(self) -> str:
        return self._fingerprint

    def _name(self, path: str | None, label: int) -> str | None:
        """The image's name in the other layouts, if the path tells."""
        if path and self._has_wnids and (match := WNID_PATH.match(path)):
            return f"{match[2]}/{match[1]}{match[3]}"
        return f"{self.classes[label]}/{path}" if path else None

    def _row_groups(self) -> Iterator[tuple[str, Path, Any, int]]:
        from pyarrow.parquet import ParquetFile

        for split, files in self._files.items():
            for file in files:
                with ParquetFile(regular(file), pre_buffer=False) as parquet:
                    for group in range(parquet.num_row_groups):
                        yield split, file, parquet, group


def _find(path: Path) -> dict[str, list[Path]]:
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return {
        split: [file for file in files if re.split(r"[-.]", file.name)[0] in PREFIXES[split]]
        for split in SPLITS
    }


def _check_columns(schema: Any) -> bool:
    """Whether the images have paths.

    Raises:
        ValueError: the columns are not those of labelled images.
    """
    import pyarrow.types as types

    kinds = dict(zip(schema.names, schema.types, strict=True))
    if not {"image", "label"} <= set(kinds):
        raise ValueError("there are no columns image and label")
    if not types.is_integer(kinds["label"]):
        raise ValueError(f"the column label is {kinds['label']}, and not whole numbers")
    image = kinds["image"]
    fields = {field.name: field.type for field in image} if types.is_struct(image) else {}
    content = fields.get("bytes", image)
    if not (types.is_binary(content) or types.is_large_binary(content)):
        raise ValueError(f"the column image is {image}, and not the files' bytes")
    return "path" in fields


def _labels(table: Any) -> np.ndarray:
    """int64; rows without a label have -1."""
    return table["label"].cast("int64").fill_null(-1).to_numpy()


def _class_names(schema: Any) -> list[str] | None:
    """ClassLabel's names, which datasets writes into the schema's metadata.

    Raises:
        ValueError: what stands in their place is something else.
    """
    about = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(about).get("info", {}).get("features", {}).get("label", {}).get("names")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError("their metadata are not as datasets writes them") from error
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    ):
        raise ValueError("their metadata have no list of names for the label")
    return names
