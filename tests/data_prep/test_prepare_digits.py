"""`python -m data_prep digits`, read back with the libraries that own the formats."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits
from streaming import LocalDataset, StreamingDataset

from data_prep.__main__ import main
from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Digits
from tarflow_dist.errors import UserError

SPLITS = {"train": 1500, "val": 297}


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "deep" / "digits"
    result = run("digits", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{out}/{form}: 1500 train and 297 val images, 10 classes, 8x8x1 png"
        for form in ("mds", "wds")
    ]
    return out


def in_order(out: Path, split: str) -> list[dict]:
    rows = pq.read_table(out / "mds" / "manifest.parquet").to_pylist()
    return [row for row in rows if row["split"] == split]


def expected(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    values, labels = load_digits(return_X_y=True)
    numbers = [int(row["source"].removeprefix("digits/")) for row in rows]
    pixels = np.array([[round(v * 255 / 16) for v in values[i]] for i in numbers])
    return pixels.reshape(-1, 8, 8), labels[numbers]


def test_a_set_holds_what_the_design_says(digits: Path) -> None:
    assert sorted(entry.name for entry in digits.iterdir()) == ["mds", "wds"]  # no leftovers
    common = ["errors.parquet", "manifest.parquet", "summary.json", "timing.json", "train", "val"]
    assert sorted(entry.name for entry in (digits / "mds").iterdir()) == common
    assert sorted(entry.name for entry in (digits / "wds").iterdir()) == ["_info.json", *common]


def test_every_digit_is_there_once_and_splits_are_stratified(digits: Path) -> None:
    rows = {split: in_order(digits, split) for split in SPLITS}
    assert {split: len(found) for split, found in rows.items()} == SPLITS
    names = [row["source"] for split in SPLITS for row in rows[split]]
    assert sorted(names) == [f"digits/{i:04d}" for i in range(1797)]
    assert {29, 30} == set(Counter(row["label"] for row in rows["val"]).values())


@pytest.mark.parametrize("split", SPLITS)
def test_local_dataset_reads_the_mds(digits: Path, split: str) -> None:
    pixels, labels = expected(in_order(digits, split))
    samples = list(LocalDataset(str(digits / "mds" / split)))
    assert [sample["i"] for sample in samples] == list(range(SPLITS[split]))
    assert [sample["y"] for sample in samples] == labels.tolist()
    assert np.array_equal(np.stack([np.asarray(sample["x"]) for sample in samples]), pixels)


def test_streaming_dataset_reads_the_mds(digits: Path) -> None:
    pixels, labels = expected(in_order(digits, "val"))
    dataset = StreamingDataset(
        local=str(digits / "mds"), split="val", batch_size=1, validate_hash="xxh64"
    )
    assert [dataset[i]["y"] for i in range(len(dataset))] == labels.tolist()
    assert np.array_equal(np.asarray(dataset[7]["x"]), pixels[7])


@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_reads_the_tars(digits: Path, split: str) -> None:
    rows = in_order(digits, split)
    pixels, labels = expected(rows)
    info = json.loads((digits / "wds" / "_info.json").read_text())["splits"][split]
    assert info["filenames"] == [f"{split}/digits-{split}-0000.tar"]
    assert info["num_samples"] == sum(info["shard_lengths"]) == SPLITS[split]
    urls = [str(digits / "wds" / name) for name in info["filenames"]]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pill"))
    assert [sample["cls"] for sample in samples] == labels.tolist()
    assert [sample["json"]["source"] for sample in samples] == [row["source"] for row in rows]
    assert np.array_equal(np.stack([np.asarray(sample["png"]) for sample in samples]), pixels)


@pytest.mark.parametrize("form", ["mds", "wds"])
def test_the_manifest_says_where_each_image_lies(digits: Path, form: str) -> None:
    table = pq.read_table(digits / form / "manifest.parquet")
    assert table.column_names == [
        *(
            "split",
            "index",
            "position",
            "source",
            "class",
            "class_name",
            "label",
            "shard",
            "offset",
            "bytes",
        ),
        *("kind", "sha256", "xxh3_64", "original_bytes", "original_width", "original_height"),
    ]
    for row in table.to_pylist()[::50]:
        stored = (digits / form / row["shard"]).read_bytes()[row["offset"] :][: row["bytes"]]
        assert hashlib.sha256(stored).hexdigest() == row["sha256"]
        with Image.open(BytesIO(stored)) as image:
            assert (image.format, image.size, row["kind"]) == ("PNG", (8, 8), "png")
        assert (row["original_bytes"], row["original_width"], row["original_height"]) == (64, 8, 8)
        assert (row["class"], row["class_name"]) == (str(row["label"]), None)


def test_the_manifest_describes_the_tars_files(digits: Path) -> None:
    rows = in_order(digits, "val")
    url = str(digits / "wds" / "val" / "digits-val-0000.tar")
    for row, sample in zip(rows, wds.WebDataset(url, shardshuffle=False), strict=True):
        assert row["sha256"] == hashlib.sha256(sample["png"]).hexdigest()
        assert row["bytes"] == len(sample["png"])
        assert sample["__key__"] == f"{row['index']:08d}"
        assert row["shard"] == "val/shard.00000.mds"


def test_raw_pixels_are_read_by_both_libraries(tmp_path: Path) -> None:
    main(["digits", str(tmp_path), "--encode", "raw"])
    rows = in_order(tmp_path, "val")
    pixels, _ = expected(rows)
    samples = list(LocalDataset(str(tmp_path / "mds" / "val")))
    assert samples[0]["x"].shape == (8, 8, 1)
    assert np.array_equal(np.stack([sample["x"] for sample in samples])[..., 0], pixels)
    url = str(tmp_path / "wds" / "val" / "digits-val-0000.tar")
    arrays = [sample["npy"] for sample in wds.WebDataset(url, shardshuffle=False).decode()]
    assert np.array_equal(np.stack(arrays)[..., 0], pixels)
    for form in ("mds", "wds"):
        row = pq.read_table(tmp_path / form / "manifest.parquet").to_pylist()[1500 + 7]
        stored = (tmp_path / form / row["shard"]).read_bytes()[row["offset"] :][: row["bytes"]]
        assert stored == pixels[7].astype(np.uint8).tobytes()


def test_the_summary_counts(digits: Path) -> None:
    summary = json.loads((digits / "wds" / "summary.json").read_text())
    assert summary["images"] == SPLITS
    assert summary["classes"] == list("0123456789")
    assert (summary["image_size"], summary["channels"], summary["errors"]) == (8, 1, 0)
    counts = Counter(row["label"] for row in in_order(digits, "train"))
    assert summary["images_per_class"]["train"] == [counts[label] for label in range(10)]


def contents(out: Path) -> dict[str, bytes]:
    """All files but the one that says how long it took."""
    files = (file for file in sorted(out.rglob("*")) if file.is_file())
    return {
        file.relative_to(out).as_posix(): file.read_bytes()
        for file in files
        if file.name != "timing.json"
    }


def test_the_same_command_writes_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    main(["digits", str(tmp_path / "again")])
    assert contents(tmp_path / "again") == contents(digits)


def test_the_seed_changes_the_order(digits: Path, tmp_path: Path) -> None:
    main(["digits", str(tmp_path), "--seed", "1", "--format", "mds"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mds"]
    one, zero = in_order(tmp_path, "train"), in_order(digits, "train")
    assert [row["source"] for row in one] != [row["source"] for row in zero]


def test_both_formats_are_cut_at_the_same_images(tmp_path: Path) -> None:
    prepare(Digits(seed=0), tmp_path, ["mds", "wds"], Settings(size=8, shard_bytes=20_000))
    index = json.loads((tmp_path / "mds" / "train" / "index.json").read_text())
    info = json.loads((tmp_path / "wds" / "_info.json").read_text())["splits"]["train"]
    lengths = [shard["samples"] for shard in index["shards"]]
    assert lengths == info["shard_lengths"]
    assert len(lengths) > 5
    rows = in_order(tmp_path, "train")
    sizes = Counter()
    for row in rows:
        sizes[row["shard"]] += row["bytes"]
    assert max(lengths) - min(lengths) <= 1
    assert 20_000 / 8 < max(sizes.values()) < 1.2 * 20_000
    assert Counter(row["shard"] for row in rows) == {
        f"train/shard.{number:05d}.mds": length for number, length in enumerate(lengths)
    }


def test_a_finished_set_is_not_overwritten(digits: Path) -> None:
    before = contents(digits)
    result = run("digits", digits, "--format", "wds")
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {digits}/wds already holds a set: remove it or choose another\n"
    )
    with pytest.raises(UserError, match=f"^{digits}/mds is a set already: choose another folder$"):
        main(["digits", str(digits / "mds")])
    assert contents(digits) == before
