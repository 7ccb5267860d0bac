"""Items → stored images, in this process or in many, in the same order."""

import hashlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from xxhash import xxh3_64_hexdigest

from data_prep.images import prepare_image
from data_prep.sources.base import Content, FilePart, Item, read_content, readable
from data_prep.workers import map_in_order
from tarflow_dist.errors import UserError

CHUNK = 8  # images sent to a worker at a time


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image as it will be stored, and what it was."""

    data: bytes
    kind: str
    sha256: str
    xxh3_64: str
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
    max_pixels: int


def encode_item(recipe: Recipe, content: Content) -> Result:
    """The stored image, or why there is none: a function of its arguments alone.

    Raises:
        UserError: the system refuses the file or the memory, which says nothing of the image.
    """
    try:
        if isinstance(content, Path | FilePart):
            content = read_content(content)
        if content is None:
            return Rejected("not there")
        stored = prepare_image(content, **vars(recipe))
    except UnidentifiedImageError:
        return Rejected("not an image that Pillow knows" if content else "empty")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Rejected(
            f"more than {recipe.max_pixels} pixels, which may be a decompression bomb: raise "
            "--max-pixels if it is honest"
        )
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            "the memory is too small for an image: the same command goes on, with fewer --workers"
        ) from error
    except Exception as error:  # decoders raise of every kind: whatever it is, it's this image's
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return Rejected(readable(said))
    data, kind, *about = stored
    return Encoded(data, kind, hashlib.sha256(data).hexdigest(), xxh3_64_hexdigest(data), *about)


def encode_items(
    items: Iterator[Item], recipe: Recipe, workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with its result, in the items' order.

    Raises:
        UserError: a worker was killed.
    """
    sent: deque[list[Item]] = deque()

    def chunks() -> Iterator[list[Content]]:
        while chunk := list(islice(items, CHUNK)):
            sent.append(chunk)
            yield [item.content for item in chunk]

    for results in map_in_order(partial(_encode_chunk, recipe), chunks(), workers):
        yield from zip(sent.popleft(), results, strict=True)


def _encode_chunk(recipe: Recipe, contents: list[Content]) -> list[Result]:
    return list(map(partial(encode_item, recipe), contents))
