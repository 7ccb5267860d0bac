"""500 damaged files among 5,000: all listed, none shipped, no crash.

The damage is such as can be found: a JPEG with a flipped bit mostly decodes, and nothing in it says
that it shouldn't. PNGs have checksums.
"""

import io
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.__main__ import main
from tarflow_dist.errors import UserError

COUNT, BAD = 5000, 500


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(1, len(content) - 14)]  # not only a PNG's end, which is empty


def flipped(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[draw.randrange(len(content) - 12)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def empty(content: bytes, draw: random.Random) -> bytes:
    return b""


def text(content: bytes, draw: random.Random) -> bytes:
    return b"<html><body>404 Not Found</body></html>"


def bomb(content: bytes, draw: random.Random) -> bytes:
    """A few hundred bytes that say they are 400 megapixels."""
    header = content[12:16] + struct.pack(">II", 20_000, 20_000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


DAMAGES = {damage.__name__: damage for damage in (truncated, flipped, empty, text, bomb)}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder, and by the names of the bad images what is wrong with them."""
    src = tmp_path_factory.mktemp("src")
    draw = random.Random(0)
    bad = dict(zip(draw.sample(range(COUNT), BAD), list(DAMAGES) * (BAD // 5), strict=True))
    rng = np.random.default_rng(0)
    broken = {}
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        damage = bad.get(i)
        # JPEGs can be cut, emptied or something else, as far as they tell
        kind = "JPEG" if i % 2 and damage not in ("flipped", "bomb") else "PNG"
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        content = file.getvalue()
        name = f"{'abcde'[i % 5]}/{i:04d}.JPEG"
        if damage:
            content = DAMAGES[damage](content, draw)
            broken[name] = damage
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_bytes(content)
    return src, broken


def test_all_are_listed_and_none_is_shipped(
    damaged: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, broken = damaged
    command = ["folder", str(src), str(tmp_path / "out"), "--size", "8", "--workers", "2"]
    with pytest.raises(UserError, match=r"\d+ of 5000 images can't be read"):
        main(command)
    main([*command, "--max-errors", "0.2"])
    assert "500 set aside, see errors.parquet" in capsys.readouterr().out

    mds = tmp_path / "out" / "mds"
    errors = pq.read_table(mds / "errors.parquet").to_pylist()
    assert {row["source"] for row in errors} == set(broken)
    stored = set(pq.read_table(mds / "manifest.parquet")["source"].to_pylist())
    assert len(stored) == COUNT - BAD
    assert not stored & set(broken)
    reasons = Counter((broken[row["source"]], row["reason"]) for row in errors)
    assert reasons["empty", "empty"] == reasons["text", "not an image that Pillow knows"] == 100
    bombs = [reason for damage, reason in reasons if damage == "bomb"]
    assert all("decompression bomb" in reason for reason in bombs)
    assert all(row["reason"] and "\n" not in row["reason"] for row in errors)
