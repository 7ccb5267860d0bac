"""Items → stored images: a function of the item alone, whichever process it runs in."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from xxhash import xxh3_64_hexdigest

from data_prep.images import prepare_image
from data_prep.sources.base import Content
from data_prep.sources.names import readable
from tarflow_dist.errors import UserError


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


def encode_item(recipe: Recipe, read: Callable[[], Content]) -> Result:
    """What `read` gives, as it will be stored, or why that can't be.

    Raises:
        UserError: the system refuses the file or the memory, which says nothing of the image.
    """
    content = None
    try:
        content = read()
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
