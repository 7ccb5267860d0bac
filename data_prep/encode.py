"""Images of a source → stored images: a function of the image alone, whichever process it runs
in."""

from collections.abc import Callable

from PIL import Image, UnidentifiedImageError

from data_prep.images import Stored, prepare_image
from data_prep.settings import Settings
from data_prep.sources.base import Content
from data_prep.sources.names import readable
from tarflow_dist.errors import UserError


def store_image(read: Callable[[], Content], settings: Settings, channels: int) -> Stored | str:
    """What `read` gives, as it will be stored, or why that can't be.

    Args:
        channels: as prepare_image.

    Raises:
        UserError: the system refuses the file or the memory, which says nothing of the image.
    """
    content = None
    try:
        content = read()
        if content is None:
            return "not there"
        return prepare_image(content, settings, channels=channels)
    except UnidentifiedImageError:
        return "not an image that Pillow knows" if content else "empty"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return (
            f"more than {settings.max_pixels} pixels, which may be a decompression bomb: raise "
            "--max-pixels if it is honest"
        )
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            "the memory is too small for an image: the same command goes on, with fewer --workers"
        ) from error
    except Exception as error:  # decoders raise of every kind: whatever it is, it's this image's
        return readable(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")
