"""Items → stored images, in this process or in many, in the same order."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import UnidentifiedImageError

from data_prep.images import prepare_image
from data_prep.sources.base import Content, FilePart, Item, readable
from tarflow_dist.errors import UserError

CHUNK = 8  # images sent to a worker at a time
IN_FLIGHT = 4  # chunks a worker may be ahead


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image as it will be stored, and what it was."""

    data: bytes
    kind: str
    sha256: str
    original_bytes: int
    original_width: int
    original_height: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """An image that could not be read."""

    reason: str


Result = Encoded | Rejected


@dataclass(frozen=True)
class Recipe:
    """What is done to each image: see prepare_image."""

    size: int | None
    channels: int
    crop: str
    encode: str


def encode_item(recipe: Recipe, content: Content) -> Result:
    """The stored image, or why there is none: a function of its arguments alone."""
    try:
        if isinstance(content, Path):
            content = content.read_bytes()
        elif isinstance(content, FilePart):
            content = content.read()
        stored = prepare_image(content, **vars(recipe))
    except UnidentifiedImageError:
        return Rejected("not an image that Pillow knows" if content else "empty")
    except Exception as error:  # decoders raise of every kind: whatever it is, it's this image's
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return Rejected(readable(said))
    data, kind, *about = stored
    return Encoded(data, kind, hashlib.sha256(data).hexdigest(), *about)


def encode_items(
    items: Iterator[Item], recipe: Recipe, workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with its result, in the items' order. Only so many are held at a time.

    Args:
        workers: processes; 1 does it in this one.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 1:
        yield from ((item, encode_item(recipe, item.content)) for item in items)
        return
    try:
        yield from _encode_in_pool(items, recipe, workers)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, mostly that is for want of memory: give the same "
            "command again to go on, with fewer --workers"
        ) from error


def _encode_in_pool(
    items: Iterator[Item], recipe: Recipe, workers: int
) -> Iterator[tuple[Item, Result]]:
    waiting: deque[tuple[list[Item], Future[list[Result]]]] = deque()
    with _pool(workers) as pool:
        while chunk := list(islice(items, CHUNK)):
            contents = [item.content for item in chunk]
            waiting.append((chunk, pool.submit(_encode_chunk, recipe, contents)))
            if len(waiting) >= IN_FLIGHT * workers:
                yield from _results(*waiting.popleft())
        while waiting:
            yield from _results(*waiting.popleft())


def _encode_chunk(recipe: Recipe, contents: list[Content]) -> list[Result]:
    return list(map(partial(encode_item, recipe), contents))


def _results(chunk: list[Item], future: Future[list[Result]]) -> Iterator[tuple[Item, Result]]:
    return zip(chunk, future.result(), strict=True)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # spawned, since a fork copies locks that this process's threads may hold
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for work forever, also when its parent has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
