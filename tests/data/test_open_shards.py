"""Both formats give the same images, and what is missing or damaged is said in a sentence."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from xxhash import xxh3_64_hexdigest

from data_prep.__main__ import main
from tarflow_dist.data.shards import open_shards
from tarflow_dist.errors import UserError

FORMATS = ["mds", "wds"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_the_digits(digits: Path, form: str, split: str) -> None:
    rows = pq.read_table(digits / form / "manifest.parquet").to_pylist()
    rows = [row for row in rows if row["split"] == split]
    values, labels = load_digits(return_X_y=True)
    shards = open_shards(digits / form, split)
    assert len(shards) == sum(shards.sizes) == len(rows)
    assert len(shards.sizes) > 1
    assert (shards.num_classes, shards.image_shape) == (10, (1, 8, 8))
    for index, row in enumerate(rows):
        number = int(row["source"].removeprefix("digits/"))
        image, label = shards[index]
        assert image.dtype == np.uint8
        assert np.array_equal(image, np.round(values[number] * 255 / 16).reshape(1, 8, 8))
        assert label == labels[number]


def test_both_formats_have_the_same_shards(digits: Path) -> None:
    mds, wds = (open_shards(digits / form, "train") for form in FORMATS)
    assert mds.sizes == wds.sizes


@pytest.mark.parametrize("form", FORMATS)
def test_shards_can_be_sent_to_a_process(digits: Path, form: str) -> None:
    shards = open_shards(digits / form, "val")
    _ = shards[0]
    copy = pickle.loads(pickle.dumps(shards))
    assert np.array_equal(copy[200][0], shards[200][0])


@pytest.fixture
def copies(digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits, tmp_path / "copies")


def refused(path: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_shards(path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_folder_above_names_the_sets(digits: Path) -> None:
    assert f"did you mean {digits}/mds or {digits}/wds?" in refused(digits)


def test_wrong_paths(digits: Path, tmp_path: Path) -> None:
    assert "there are no shards at" in refused(tmp_path / "nope")
    assert "no folder of shards" in refused(tmp_path)
    assert "has no split test, only train, val" in refused(digits / "mds", "test")


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_sets(copies: Path, form: str) -> None:
    path = copies / form
    shard = sorted((path / "train").glob("*0003.*"))[0]
    with shard.open("r+b") as file:
        file.truncate(1000)
    assert f"{shard} is missing or cut short (1000 of " in refused(path)
    shard.unlink()
    assert f"{shard} is missing or cut short (0 of " in refused(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows.drop_columns("offset"),
        lambda rows: rows.slice(1),
        lambda rows: rows.take(list(range(len(rows)))[::-1]),
        lambda rows: rows.set_column(rows.column_names.index("label"), "label", [[10] * len(rows)]),
        lambda rows: rows.filter(pc.equal(rows["split"], "val")),
        *(
            lambda rows, name=name, value=value: pa.table(
                rows.to_pydict() | {name: [value, *rows[name].to_pylist()[1:]]}
            )
            for name, value in (
                ("bytes", None),
                ("bytes", 2**62),
                ("bytes", -1),
                ("bytes", 0.5),
                ("offset", 2**63 - 1),
                ("offset", -5),
                ("shard", None),
                ("shard", "train/" + "x" * 300),
                ("label", None),
                ("xxh3_64", None),
            )
        ),
        lambda rows: pa.table(rows.to_pydict() | {"label": list(map(str, range(len(rows))))}),
    ],
)
def test_a_manifest_that_is_not_as_written(copies: Path, spoil: Callable) -> None:
    file = copies / "mds" / "manifest.parquet"
    pq.write_table(spoil(pq.read_table(file)), file)
    assert main(["verify", str(copies / "mds")]) == 1
    assert "manifest" in (said := refused(copies / "mds")) or "holds no images in train" in said


@pytest.mark.parametrize("name", ["manifest.parquet", "summary.json"])
def test_damaged_records(copies: Path, name: str) -> None:
    """Bits flipped anywhere: the same images, or a sentence, but never another error."""
    file = copies / "wds" / name
    data = file.read_bytes()
    whole = open_shards(copies / "wds", "val")
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            image, _ = open_shards(copies / "wds", "val")[7]
        except UserError:
            continue
        assert np.array_equal(image, whole[7][0])
    for nothing in (b"", b"{}", b"[]"):
        file.write_bytes(nothing)
        assert "damaged" in refused(copies / "wds")
    file.unlink()
    refused(copies / "wds")


def test_sets_that_no_batches_can_be_made_of(copies: Path) -> None:
    for name in ("summary.json", "manifest.parquet"):
        (copies / "mds" / name).unlink()
    assert "MDS shards that data_prep did not write" in refused(copies / "mds")
    summary = copies / "wds" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"image_size": None}))
    assert "keeps the images in their own sizes" in refused(copies / "wds")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("image_size", value) for value in ("8", 0, -8, 8.5, 10**30, [], True)),
        *(("channels", value) for value in (None, 2, "3")),
        *(("classes", value) for value in (None, "0123456789", [1, 2], {})),
        *(("settings", value) for value in (None, [], {"encode": 7}, {})),
    ],
)
def test_a_summary_of_nonsense(copies: Path, field: str, value: object) -> None:
    summary = copies / "wds" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {field: value}))
    assert "its summary or manifest is not as written" in refused(copies / "wds")
    with pytest.raises(UserError, match="is damaged"):
        main(["show", str(copies / "wds")])


def png(side: int, mode: str) -> bytes:
    file = BytesIO()
    Image.new(mode, (side, side)).save(file, "PNG")
    return file.getvalue()


def eps() -> bytes:
    file = BytesIO()
    Image.new("L", (8, 8)).save(file, "EPS")
    return file.getvalue()


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"garbage", "is no image of the set's kind"),
        (eps(), "is no image of the set's kind"),  # Pillow has Ghostscript run it
        (png(9, "L"), "is 9x9 L, not 8x8 L"),
        (png(8, "RGB"), "is 8x8 RGB, not 8x8 L"),
        (png(20_000, "1"), "not 8x8 L|decompression bomb"),
    ],
)
def test_what_has_its_hash_and_is_no_stored_image(copies: Path, stored: bytes, said: str) -> None:
    """A stranger's set can have any bytes under the right hash."""
    folder = copies / "mds"
    rows = pq.read_table(folder / "manifest.parquet")
    table = rows.to_pylist()
    shard = folder / table[0]["shard"]
    last = [row for row in table if row["shard"] == table[0]["shard"]][-1]
    last |= {"bytes": len(stored), "xxh3_64": xxh3_64_hexdigest(stored)}
    shard.write_bytes(shard.read_bytes()[: last["offset"]] + stored)
    pq.write_table(pa.Table.from_pylist(table, rows.schema), folder / "manifest.parquet")
    with pytest.raises(UserError, match=said):
        _ = open_shards(folder, last["split"])[last["index"]]


def test_a_pipe_is_no_shard(copies: Path) -> None:
    shards = open_shards(copies / "mds", "train")
    file = sorted((copies / "mds" / "train").glob("*.mds"))[0]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="it is not a regular file"):
        _ = shards[0]
    assert "is missing or cut short" in refused(copies / "mds")
