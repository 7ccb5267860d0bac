"""`python -m data_prep verify`: whole sets are whole, and damage is named wherever it is."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run
from damage import damage_shards

from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Digits
from data_prep.verify import verify

FORMATS = ("mds", "wds")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in more than a hundred shards a format."""
    out = tmp_path_factory.mktemp("whole")
    prepare(Digits(seed=0), out, FORMATS, Settings(size=8, shard_bytes=1200))
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def test_a_whole_set_in_one_line(whole: Path) -> None:
    done = run("data_prep", "verify", whole, "--workers", 2)
    assert done.stdout == f"{whole}: whole\n"
    done = run("data_prep", "verify", whole / "wds")
    assert done.stdout == f"{whole}/wds: whole\n"


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_other_encodings_are_whole_too(encode: str, tmp_path: Path) -> None:
    prepare(Digits(seed=0), tmp_path, FORMATS, Settings(size=8, encode=encode))
    assert list(verify(tmp_path)) == []


def test_each_of_200_damaged_shards_is_named(copy: Path) -> None:
    damaged = {f"mds/{name}" for name in damage_shards(copy / "mds", count=100, seed=1)}
    damaged |= {f"wds/{name}" for name in damage_shards(copy / "wds", count=100, seed=2)}
    done = run("data_prep", "verify", copy, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *lines, total = done.stdout.splitlines()
    assert {line.partition(": ")[0] for line in lines} == damaged
    assert len(lines) == 200
    assert total == f"{copy}: 200 things are wrong"


@pytest.mark.parametrize("form", FORMATS)
def test_any_flipped_bit_is_found(copy: Path, form: str) -> None:
    """Also in headers, in padding, in labels."""
    folder = copy / form
    shutil.rmtree(copy / ("wds" if form == "mds" else "mds"))
    files = sorted(file for file in (folder / "val").iterdir() if file.suffix in (".mds", ".tar"))
    rng = random.Random(0)
    changed = rng.sample(files, 25)
    for file in changed:
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    assert {line.partition(": ")[0] for line in verify(folder)} == {
        f"val/{f.name}" for f in changed
    }


def test_it_says_what_is_wrong(copy: Path) -> None:
    (copy / "mds" / "train" / "shard.00003.mds").unlink()
    (copy / "wds" / "val" / "more.tar").write_text("what is this")
    cut = copy / "mds" / "val" / "shard.00001.mds"
    cut.write_bytes(cut.read_bytes()[:-9])
    lines = list(verify(copy))
    assert lines[0] == "mds/train/shard.00003.mds: no such file or directory"
    assert lines[1].startswith("mds/val/shard.00001.mds: ")
    assert "bytes long and not" in lines[1]
    assert "and 1 more" not in lines[1]  # only the last image is gone
    assert lines[2] == "wds/val/more.tar: belongs to no set"
    assert len(lines) == 3


def edit_summary(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))


def edit_manifest(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(folder / "manifest.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "manifest.parquet")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["images"].update(train=7), "counts of train images"),
        (lambda s: s["images_per_class"]["val"].reverse(), "counts of val images"),
        (lambda s: s.update(errors=1), "0 rows, but summary.json counts 1"),
        (lambda s: s["classes"].reverse(), "labels and class names are not those"),
        (lambda s: s["classes"].pop(), "labels are not among the 9 classes"),
        (lambda s: s.update(image_size=16), "8x8 L, not 16x16 L"),
        (lambda s: s.update(channels=3), "8x8 L, not 8x8 RGB"),
        (lambda s: s.pop("classes"), "the summary's classes is not as written"),
    ],
)
def test_a_summary_that_is_not_of_this_set(
    copy: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit_summary(copy / "mds", change)
    assert said in "\n".join(verify(copy / "mds"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_label_is_held_against_the_shard(copy: Path, form: str) -> None:
    def swap_labels(rows: list[dict[str, Any]]) -> None:
        one, two = next((a, b) for a in rows for b in rows if a["label"] != b["label"])
        for name in ("label", "class"):
            one[name], two[name] = two[name], one[name]

    edit_manifest(copy / form, swap_labels)  # counts stay as they are
    lines = list(verify(copy / form))
    assert lines
    assert all("labels, names or places are not the manifest's" in line for line in lines)


@pytest.mark.parametrize("form", FORMATS)
def test_any_file_may_be_missing_or_nonsense(whole: Path, form: str, tmp_path: Path) -> None:
    records = {"mds": "val/index.json", "wds": "_info.json"}[form]
    for name in ("summary.json", "manifest.parquet", "errors.parquet", records):
        for content in (None, b"", b"{}", b"[1, 2]", b"\xff\x00"):
            folder = shutil.copytree(whole / form, tmp_path / "set")
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            lines = list(verify(folder))
            assert "missing or damaged" in lines[0], (name, content)
            assert all("\n" not in line for line in lines)
            shutil.rmtree(folder)


def test_no_set_is_a_user_error(tmp_path: Path) -> None:
    done = run("data_prep", "verify", tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} holds no set: give a folder that data_prep wrote\n"


@pytest.mark.parametrize("name", ["../outside.mds", "/etc/passwd"])
def test_a_manifest_leads_nowhere_else(copy: Path, name: str) -> None:
    rows = pq.read_table(copy / "mds" / "manifest.parquet")
    shards = rows["shard"].to_pylist()
    (copy / "mds" / shards[0]).rename(copy / "outside.mds")
    shards = [name if shard == shards[0] else shard for shard in shards]
    place = rows.schema.get_field_index("shard")
    rows = rows.set_column(place, "shard", pa.array(shards))
    pq.write_table(rows, copy / "mds" / "manifest.parquet")
    assert any("leads out of its folder" in line for line in verify(copy / "mds"))


def test_a_pipe_is_no_shard(copy: Path) -> None:
    shard = copy / "mds" / "train" / "shard.00000.mds"
    shard.unlink()
    os.mkfifo(shard)
    assert "train/shard.00000.mds: it is not a regular file" in list(verify(copy / "mds"))
