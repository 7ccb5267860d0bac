"""Shards against the libraries whose formats they have, and how images are dealt to them."""

import json
from collections import defaultdict
from pathlib import Path

import layouts
import numpy as np
import pyarrow.parquet as pq
import pytest
from streaming import MDSWriter

from data_prep.formats import MDS, Shard
from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Parquet


@pytest.mark.parametrize(
    ("encode", "column"),
    [("png", "png"), ("jpeg", "jpeg"), ("keep", "jpeg"), ("raw", "ndarray:uint8:4,4,3")],
)
def test_mds_shards_are_those_that_streaming_writes(
    encode: str, column: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    images = [
        image.tobytes()[: None if encode == "raw" else 20 + i] for i, image in enumerate(pixels)
    ]
    ours = MDS("any", encode, (4, 4, 3))
    columns = {"i": "int", "x": column, "y": "int"}
    writer = MDSWriter(
        columns=columns, out=str(tmp_path / "train"), hashes=["sha1", "xxh64"], size_limit=None
    )
    shards = []
    for number, begin in enumerate((0, 4)):
        some = range(begin, min(begin + 4, 7))
        for i in some:
            image = pixels[i] if encode == "raw" else images[i]
            writer.write({"i": i, "x": image, "y": 7 * i})
        writer.flush_shard()
        writer._reset_cache()
        rows = [{"position": i, "label": 7 * i, "data": images[i]} for i in some]
        data, offsets = ours.pack(rows)
        assert [data[at:][: len(images[i])] for i, at in zip(some, offsets, strict=True)] == [
            images[i] for i in some
        ]
        file = ours.file("train", number)
        assert (tmp_path / file).read_bytes() == data
        shards.append(Shard(file, len(some), len(data), ours.hashes(data)))
    writer.finish()
    theirs = (tmp_path / "train" / "index.json").read_text()
    ours.write_index(tmp_path, {"train": shards})
    assert (tmp_path / "train" / "index.json").read_text() == theirs


def test_rows_that_are_read_at_once_are_dealt_at_once(tmp_path: Path) -> None:
    """All others are dealt one by one."""
    layouts.write_parquet(tmp_path / "src")
    layouts.write_folder(tmp_path / "folder")
    settings = Settings(size=16, shard_bytes=3000)
    prepare(Parquet(tmp_path / "src"), tmp_path / "out", ["mds"], settings)
    summary = json.loads((tmp_path / "out" / "mds" / "summary.json").read_text())
    assert "shuffled in blocks" in summary["notes"][0]
    group = {}
    for file in sorted((tmp_path / "src" / "data").glob("train-*")):
        paths = pq.read_table(file)["image"].combine_chunks().field("path").to_pylist()
        group |= {path.rpartition("_")[0]: (file.name, row // 4) for row, path in enumerate(paths)}
    shards = defaultdict(list)
    for row in pq.read_table(tmp_path / "out" / "mds" / "manifest.parquet").to_pylist():
        if row["split"] == "train":
            shards[row["shard"]].append(group[Path(row["source"]).stem])
    assert len(shards) > 4
    reads = sum(len(set(groups)) for groups in shards.values())
    assert reads < len(set(group.values())) + len(shards)
    assert sum(map(len, shards.values())) == len(group) - 1  # and one that is no image
