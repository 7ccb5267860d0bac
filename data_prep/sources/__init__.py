"""Where images come from: one small class a layout, and which of them a folder has."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.sources import huggingface, mds, npz
from data_prep.sources.archives import Archives
from data_prep.sources.base import Content, Place, Source
from data_prep.sources.digits import Digits as Digits
from data_prep.sources.digits import read_digit
from data_prep.sources.edm import EDM
from data_prep.sources.folder import Folder
from data_prep.sources.huggingface import Arrow, Parquet
from data_prep.sources.kaggle import Kaggle
from data_prep.sources.mds import MDS
from data_prep.sources.npz import Npz
from data_prep.sources.storage import (
    ObjectPath,
    forget_listings,
    patiently,
    read_file,
    read_part,
    unreadable,
)
from data_prep.sources.walk import images_in
from data_prep.sources.wds import WebDataset
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside

LAYOUTS: dict[str, Any] = {
    "folder": Folder,
    "archives": Archives,
    "kaggle": Kaggle,
    "parquet": Parquet,
    "npz": Npz,
    "wds": WebDataset,
    "mds": MDS,
    "edm": EDM,
    "arrow": Arrow,
}
ALL_IMAGES = ("folder", "kaggle", "edm")
"""Those of them that are folders of images themselves."""
AHEAD = 8
"""Images that are fetched from a store at a time."""
READERS: dict[str, Callable[..., Content]] = {
    "file": lambda file, place: read_file(file),
    "part": lambda file, place: read_part(file, place.offset, place.size),
    "absent": lambda file, place: None,
    "digits": read_digit,
    "npz": npz.read_pixels,
    "mds": mds.read_sample,
    "parquet": huggingface.read_row,
    "arrow": huggingface.read_row,
}
"""How an image is read from its file and place."""


def read_image(path: Path, place: Place) -> Content:
    """The image at `place` in the source at `path`.

    Raises:
        NotRegularError: it is no file.
        UserError: the system refuses the file, again and again, or what many images lie in is
            damaged.
    """
    kind, *arguments = place.reader.split(" ")
    file = inside(path, place.file) if place.file else path
    return patiently(partial(READERS[kind], file, place, *arguments), file)


def read_images(path: Path, places: Sequence[Place]) -> Iterator[Callable[[], Content]]:
    """`read_image` of each of `places`, in order. From a store, the next ones are on their way."""
    if not isinstance(path, ObjectPath):
        yield from (partial(read_image, path, place) for place in places)
        return
    alone = all(place.reader in ("file", "part") for place in places)
    coming: deque[Future[Content]] = deque()
    with ThreadPoolExecutor(AHEAD if alone else 1) as pool:
        for place in places:
            coming.append(pool.submit(read_image, path, place))
            if len(coming) > AHEAD:
                yield coming.popleft().result
        yield from (image.result for image in coming)


def open_source(path: Path, *, layout: str = "auto", val_fraction: float, seed: int) -> Source:
    """The images in `path`.

    Args:
        layout: one of LAYOUTS, or auto, which looks what is there.
        val_fraction: share of each class that is held out where there is no val.
        seed: of what is held out.

    Raises:
        UserError: there is no such folder, no such layout in it, or more than one; val would be
            empty.
    """
    forget_listings()
    try:
        if not path.is_dir() and not (path.is_file() and EDM.recognises(path)):
            raise UserError(
                f"there is no folder {path}: give one with images in a layout of --layout"
            )
        advice = ""
        if layout == "auto":
            found = [known for known, kind in LAYOUTS.items() if kind.recognises(path)]
            if len(found) > 1:
                raise UserError(f"{path} holds {' and '.join(found)}: choose one with --layout")
            layout = found[0] if found else "folder"
            advice = f"; if it is no {layout} set, choose another --layout" if found else ""
        try:
            source: Source = LAYOUTS[layout](path)
            source.hold_out(val_fraction, seed)
            if layout not in ALL_IMAGES and path.is_dir():
                source.passed_over += Counter({"images beside": len(images_in(path).names)})
            return source
        except UserError as error:
            raise UserError(f"{error}{advice}") from error
    except OSError as error:  # which says nothing of what is in the files
        raise unreadable(error) from error
