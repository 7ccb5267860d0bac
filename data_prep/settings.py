"""What a preparation is told, and with which versions it works."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

HONEST_PIXELS = 1 << 28
"""Of an image file, unless the user knows better: phones make 200 million."""


@dataclass(frozen=True)
class Settings:
    """What the stored bytes depend on, besides the source."""

    size: int | None
    """Side of the square images; None where `encode` is keep."""
    crop: str = "adm"
    """A key of images.CROPS."""
    encode: str = "png"
    """One of images.ENCODINGS."""
    seed: int = 0
    max_errors: float = 0.01
    """Share of the images that may be unreadable; ten may be in any case, but never all."""
    max_pixels: int = HONEST_PIXELS
    """Of an image file; larger ones are set aside."""
    shard_bytes: int = 1 << 26
    """About what the image files in a shard have together, unless they are more than 2048."""

    def identity(self) -> dict[str, Any]:
        """What tells two preparations apart: a field that came later is left out at its default, so
        that earlier sets are recognised."""
        own = asdict(self)
        del own["max_errors"]  # with another, the same one goes on
        if self.max_pixels == HONEST_PIXELS:
            del own["max_pixels"]
        return own


def versions() -> dict[str, str]:
    names = ("tarflow_dist", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
