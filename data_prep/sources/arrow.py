"""Folders that save_to_disk of Hugging Face's datasets writes."""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_prep.sources.base import Place
from data_prep.sources.objects import ObjectPath
from data_prep.sources.splits import HoldOut, find_splits
from data_prep.sources.tables import Part, Tables, image_in, table_columns
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside, read_json, regular

SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"


class Arrow(Tables):
    """A folder with a dataset_dict.json and a folder a split, or the folder of one split, each with
    a state.json and data-*.arrow; for what is in these, see Tables. Where there is no val, it is
    drawn here.

    Args:
        val_fraction: share of each class held out where there is no val.

    Raises:
        UserError: `path` is no such folder, or a file is damaged.
    """

    layout = "arrow"

    def __init__(self, path: Path, *, val_fraction: float, seed: int):
        if isinstance(path, ObjectPath):
            raise UserError(f"can't read {path}: folders of save_to_disk are mapped from a disk")
        splits: dict[str, list[str]] = {"train": [""]}
        others: list[str] = []
        try:
            if (path / SPLITS_FILE).is_file():
                splits, others = find_splits(map(str, read_json(path / SPLITS_FILE)["splits"]))
            self._files = [
                (split, inside(folder, about["filename"]))
                for split, names in splits.items()
                for folder in (inside(path, name) if name else path for name in names)
                for about in read_json(folder / STATE_FILE)["_data_files"]
            ]
        except PermissionError:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path} is not whole as save_to_disk writes it ({error}): copy it again"
            ) from error
        if "train" not in splits:
            raise UserError(f"{path} has no split that is called train")
        super().__init__(path, None if "val" in splits else HoldOut(val_fraction, seed))
        if "val" not in splits:
            self.notes = ("no split for val: a share of each class is held out",)
        self.passed_over |= {f"folder {name}/": 1 for name in others}

    @staticmethod
    def recognises(path: Path) -> bool:
        alone = (path / STATE_FILE).is_file() and any(path.glob("*.arrow"))
        return (path / SPLITS_FILE).is_file() or alone

    def parts(self) -> Iterator[Part]:
        """The files' record batches."""
        import pyarrow as pa

        for split, file in self._files:
            with pa.memory_map(str(regular(file))) as source, pa.ipc.open_stream(source) as batches:
                for number, batch in enumerate(batches):
                    yield Part(split, file, number, batches.schema, partial(_read, batch))


def read_row(file: Path, place: Place) -> bytes | None:
    return image_in(_batches(file)[place.block], place.offset)


@lru_cache(maxsize=1)
def _batches(file: Path) -> list[Any]:
    """The images of each record batch, in the mapped file."""
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(pa.memory_map(str(regular(file)))) as batches:
            column = table_columns(batches.schema).image
            return [_read(batch, [column])[column] for batch in batches]
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):  # the system's, and not pyarrow's
            raise
        said = str(error).splitlines()[0]
        raise UserError(f"{file} is damaged ({said}): fetch it again") from error


def _read(batch: Any, columns: list[str]) -> Any:
    import pyarrow as pa

    names = [column.partition(".")[0] for column in columns]
    table = pa.Table.from_batches([batch]).select(names)
    table.validate(full=True)  # or what is damaged would be read past its end
    return table
