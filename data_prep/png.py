"""PNG files without the chunks that only tell something about the picture."""

import struct
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
DROPPED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # Pillow refuses an image for large ones
ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts that may tell it
LARGEST_TEXT = 1 << 20


def without_texts(content: bytes) -> bytes:
    """`content`, if it is a PNG, without texts and colour profiles, but for those texts of no great
    size that may say how the picture is turned. What is damaged stays as it is."""
    if not content.startswith(SIGNATURE):
        return content
    return SIGNATURE + b"".join(_kept(content))


def _kept(content: bytes) -> Iterator[bytes]:
    begin = len(SIGNATURE)
    while begin + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, begin)
        end = begin + 12 + length
        keyword = content[begin + 8 : begin + 8 + 80].partition(b"\0")[0]
        tells = keyword in ORIENTATION and length <= LARGEST_TEXT
        if kind not in DROPPED or (kind != b"iCCP" and tells):
            yield content[begin:end]
        begin = end
