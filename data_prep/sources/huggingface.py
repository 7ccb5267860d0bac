"""Tables of images and labels as Hugging Face has them: parquet files of its hub, and the folders
that save_to_disk of its datasets writes."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.sources.base import Group, Place, Source
from data_prep.sources.names import MAX_CLASSES, SPLITS, find_splits, wnids_by_label
from data_prep.sources.storage import ObjectPath, damage_named, open_file
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside, read_json, regular

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
# imagenet-1k's paths: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG
WNID_PATH = re.compile(r"^(?:.*/)?([^/]+)_(n\d{8})(\.\w+)$")
# how the hub's names begin; test files have no labels
PREFIXES = {"train": ("train",), "val": ("validation", "valid", "val")}
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"


class Block(NamedTuple):
    """Rows that are read at once."""

    schema: Any
    read: Callable[[list[str]], Any]
    """The table of these columns; NAME.path is a part of one."""


class Columns(NamedTuple):
    """Which of a table's columns hold what."""

    image: str
    label: str
    has_path: bool
    """Whether the images have paths."""


class Part(NamedTuple):
    """What is known of a block's rows."""

    split: str
    file: Path
    number: int
    """Of the block in its file."""
    labels: np.ndarray
    """(rows,) int64, -1 without one."""
    paths: list[str | None]
    """What the images' files were called, if known."""


class Tables(Source):
    """Rows of an image, the file's bytes or a struct of `bytes` and perhaps `path`, and its label,
    an integer; rows whose label is -1 or null are left out. Labels stay as they are. Classes are
    the wnids in the paths, where each label has its own in sorted order (as in imagenet-1k), or
    else ClassLabel's names, or else the numbers.

    Args:
        files: the splits and their files.

    Raises:
        UserError: a file is damaged, or holds no such table.
    """

    def __init__(
        self,
        layout: str,
        path: Path,
        files: Sequence[tuple[str, Path]],
        *,
        passed_over: Mapping[str, int] | None = None,
    ):
        with damage_named(f"the {layout} files in {path} can't be read"):
            names: list[str] | None = None
            parts = []
            for split, file in files:
                for number, block in enumerate(_blocks(file)):
                    columns = _columns(block.schema)
                    names = names or _class_names(block.schema, columns.label)
                    parts.append(Part(split, file, number, *_labels_and_paths(block, columns)))
            wnids, count = _wnids(parts, names)
        classes = wnids or names or [str(number) for number in range(count)]
        groups, without = [], 0
        for part in parts:
            rows = np.flatnonzero(part.labels >= 0)
            labels = part.labels[rows]
            without += len(part.labels) - len(rows)
            group = Group(
                part.split,
                labels,
                f"{part.split}/",
                part.file,
                [
                    _name(part, row, classes[label], wnids is not None)
                    for row, label in zip(rows.tolist(), labels.tolist(), strict=True)
                ],
                np.stack([rows, np.zeros_like(rows)], axis=1),
                reader=layout,
                block=part.number,
                in_block=layout == "parquet",
            )
            groups.append(group)
        super().__init__(
            layout,
            path,
            classes,
            groups,
            names if wnids else None,
            passed_over={**(passed_over or {}), "without a label": without},
        )


class Parquet(Tables):
    """A folder with train-*.parquet and validation-*.parquet, itself or in data/; for what is in
    them, see Tables.

    Raises:
        UserError: `path` is no such folder, or a file is damaged.
    """

    def __init__(self, path: Path):
        found = _find(path)
        if missing := [split for split in SPLITS if not found[split]]:
            begin = PREFIXES[missing[0]][0]
            raise UserError(f"{path} has no files {begin}-*.parquet, here or in data/")
        files = [(split, file) for split in SPLITS for file in found[split]]
        super().__init__("parquet", path, files)

    @staticmethod
    def recognises(path: Path) -> bool:
        return any(_find(path).values())


def _find(path: Path) -> dict[str, list[Path]]:
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return {
        split: [file for file in files if re.split(r"[-.]", file.name)[0] in PREFIXES[split]]
        for split in SPLITS
    }


class Arrow(Tables):
    """A folder with a dataset_dict.json and a folder a split, or the folder of one split, each with
    a state.json and data-*.arrow; for what is in these, see Tables.

    Raises:
        UserError: `path` is no such folder, or a file is damaged.
    """

    held_out_note = "no split for val: a share of each class is held out"
    held_out_by_name = False

    def __init__(self, path: Path):
        if isinstance(path, ObjectPath):
            raise UserError(f"can't read {path}: folders of save_to_disk are mapped from a disk")
        splits: dict[str, list[str]] = {"train": [""]}
        others: list[str] = []
        with damage_named(f"{path} is not whole as save_to_disk writes it", "copy it again"):
            if (path / SPLITS_FILE).is_file():
                splits, others = find_splits(map(str, read_json(path / SPLITS_FILE)["splits"]))
            files = [
                (split, inside(folder, about["filename"]))
                for split, names in splits.items()
                for folder in (inside(path, name) if name else path for name in names)
                for about in read_json(folder / STATE_FILE)["_data_files"]
            ]
        if "train" not in splits:
            raise UserError(f"{path} has no split that is called train")
        passed_over = {f"folder {name}/": 1 for name in others}
        super().__init__("arrow", path, files, passed_over=passed_over)

    @staticmethod
    def recognises(path: Path) -> bool:
        alone = (path / STATE_FILE).is_file() and any(path.glob("*.arrow"))
        return (path / SPLITS_FILE).is_file() or alone


def _blocks(file: Path) -> Iterator[Block]:
    """A parquet file's row groups, or an arrow file's record batches."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    if file.suffix == ".arrow":
        with pa.memory_map(str(regular(file))) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                yield Block(batches.schema, partial(_select, batch))
    else:
        with open_file(file) as stream, ParquetFile(stream, pre_buffer=False) as parquet:
            for group in range(parquet.num_row_groups):
                yield Block(parquet.schema_arrow, partial(parquet.read_row_group, group))


def _select(batch: Any, columns: list[str]) -> Any:
    import pyarrow as pa

    names = [column.partition(".")[0] for column in columns]
    table = pa.Table.from_batches([batch]).select(names)
    table.validate(full=True)  # or what is damaged would be read past its end
    return table


def _labels_and_paths(block: Block, columns: Columns) -> tuple[np.ndarray, list[str | None]]:
    """As Part has them."""
    wanted = [f"{columns.image}.path", columns.label]
    table = block.read(wanted if columns.has_path else wanted[1:])
    labels = table[columns.label].cast("int64").fill_null(-1).to_numpy()
    if not columns.has_path:
        return labels, [None] * len(labels)
    return labels, table[columns.image].combine_chunks().field("path").to_pylist()


def _wnids(parts: list[Part], names: list[str] | None) -> tuple[list[str] | None, int]:
    """The wnids in the paths, if each label has its own in sorted order, and how many classes there
    are.

    Raises:
        ValueError: the labels are none.
    """
    seen = {
        (label, match[2] if (match := WNID_PATH.match(path or "")) else "")
        for part in parts
        for label, path in zip(part.labels.tolist(), part.paths, strict=True)
        if label != -1
    }
    if not seen:
        raise ValueError("no row has a label")
    (least, _), (most, _) = min(seen), max(seen)
    count = len(names) if names else min(most + 1, MAX_CLASSES)
    if not 0 <= least <= most < count:
        raise ValueError(f"labels go from {least} to {most}, with {count} classes")
    return wnids_by_label(seen, count), count


def _name(part: Part, row: int, folder: str, has_wnids: bool) -> str:
    """The image's name in the other layouts, in the `folder` of its class, if its path tells."""
    path = part.paths[row]
    if path and has_wnids and (match := WNID_PATH.match(path)):
        return f"{match[2]}/{match[1]}{match[3]}"
    return f"{folder}/{path}" if path else f"{part.file.name}/{part.number}/{row}"


def read_row(file: Path, place: Place) -> bytes | None:
    """The file in that row of a column of images."""
    image = _images(file, place.block)[place.offset].as_py()
    return image["bytes"] if isinstance(image, dict) else image


@lru_cache(maxsize=1)
def _images(file: Path, number: int) -> Any:
    """The column of images of a block."""
    try:
        blocks = _blocks(file)  # whose end closes the file
        block = next(islice(blocks, number, None))
        column = _columns(block.schema).image
        return block.read([column])[column]
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):  # the system's, and not pyarrow's
            raise
        said = str(error).splitlines()[0]
        raise UserError(f"{file} is damaged ({said}): fetch it again") from error


def _columns(schema: Any) -> Columns:
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
