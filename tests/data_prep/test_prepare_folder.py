"""`python -m data_prep folder`: layouts, odd and damaged images, and what users get wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from streaming import LocalDataset

from data_prep.__main__ import main
from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Source, open_source
from data_prep.sources.names import set_name
from tarflow_dist.errors import UserError


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def picture(
    file: Path, colour: object = (200, 30, 30), mode: str = "RGB", **options: object
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), colour).save(file, **options)
    return file


def rows(out: Path, table: str = "manifest") -> list[dict]:
    return pq.read_table(out / f"{table}.parquet").to_pylist()


def folder(src: Path, val_fraction: float = 0.1, seed: int = 0) -> Source:
    return open_source(src, layout="folder", val_fraction=val_fraction, seed=seed)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Two classes of ten, one of them partly in subfolders, among things that are no images."""
    for i in range(10):
        picture(tmp_path / "src" / "cat" / f"{i}.png", (i, 0, 0))
        picture(tmp_path / "src" / "ant" / f"deep{i % 2}" / f"{i}.JPG", (0, i, 0))
    picture(tmp_path / "src" / ".hidden" / "a.png")
    picture(tmp_path / "src" / "cat" / "._0.png", format="PNG")
    picture(tmp_path / "src" / "loose.png")
    (tmp_path / "src" / "notes").mkdir()
    (tmp_path / "src" / "notes" / "a.txt").write_text("no image")
    return tmp_path / "src"


def test_classes_are_the_first_folders_in_sorted_order(src: Path) -> None:
    source = folder(src)
    assert source.classes == ["ant", "cat"]
    assert len(source) == 20
    for item in source.items():
        assert item.name.split("/")[0] == source.classes[item.label]
    assert {item.name for item in source.items() if "deep1" in item.name} == {
        f"ant/deep1/{i}.JPG" for i in range(1, 10, 2)
    }


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 1), (0.3, 3), (0.01, 1), (0.99, 9)])
def test_each_class_gives_its_share_to_val(src: Path, fraction: float, count: int) -> None:
    val = [item.label for item in folder(src, fraction).items() if item.split == "val"]
    assert val == [0] * count + [1] * count


def test_the_split_depends_on_the_seed_alone(src: Path) -> None:
    def val(seed: int) -> set[str]:
        return {item.name for item in folder(src, 0.5, seed).items() if item.split == "val"}

    assert val(0) == val(0)
    assert val(0) != val(1)


def test_train_and_val_folders_are_the_splits(tmp_path: Path) -> None:
    for name in ("train/b/1", "train/a/1", "train/a/2", "val/b/9"):
        picture(tmp_path / f"{name}.png")
    found = [(item.split, item.label, item.name) for item in folder(tmp_path).items()]
    assert found == [
        ("train", 0, "train/a/1.png"),
        ("train", 0, "train/a/2.png"),
        ("train", 1, "train/b/1.png"),
        ("val", 1, "val/b/9.png"),
    ]


def test_the_command_writes_the_pictures(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["folder", str(src), str(tmp_path / "out"), "--size", "16", "--crop", "tarflow"])
    mds = tmp_path / "out" / "mds"
    assert capsys.readouterr().out.splitlines() == [
        f"{mds}: 18 train and 2 val images, 2 classes, 16x16x3 png",
        "4 files passed over: 2 hidden, 1 .txt, 1 loose images",
        f"folders without images are no classes: notes in {src}",
    ]
    train = [row for row in rows(mds) if row["split"] == "train"]
    for row, sample in zip(train, LocalDataset(str(mds / "train")), strict=True):
        with Image.open(src / row["source"]) as image:
            colour = image.convert("RGB").getpixel((0, 0))
        assert np.array_equal(np.asarray(sample["x"]), np.full((16, 16, 3), colour, np.uint8))
        assert sample["y"] == row["label"] == ["ant", "cat"].index(row["class"])


def test_jpeg_encoding(src: Path, tmp_path: Path) -> None:
    settings = Settings(size=16, encode="jpeg")
    prepare(folder(src), tmp_path / "out", ["mds", "wds"], settings)
    assert LocalDataset(str(tmp_path / "out" / "mds" / "train"))[0]["x"].format == "JPEG"


def test_bad_images_are_set_aside_with_their_reason(src: Path, tmp_path: Path) -> None:
    whole = picture(src / "cat" / "odd-cut.jpg", quality=95)
    whole.write_bytes(whole.read_bytes()[:-200])
    (src / "cat" / "odd-text.png").write_text("this is no image")
    (src / "cat" / "odd-empty.webp").touch()
    (src / "cat" / "odd-gone.png").symlink_to("nowhere")
    picture(src / "cat" / "odd-float.tif", 0.5, "F")
    picture(src / "cat" / "fine-cmyk.jpg", (0, 255, 255, 0), "CMYK")
    picture(src / "cat" / "fine-palette.gif", 0, "P")
    picture(src / "cat" / "fine-alpha.webp", (1, 2, 3, 4), "RGBA")
    picture(src / "cat" / "fine-16bit.png", 40_000, "I;16")

    result = run("folder", src, tmp_path / "out", "--size", 8, "--format", "wds")
    assert result.returncode == 0, result.stderr
    assert "5 set aside, see errors.parquet" in result.stdout
    reasons = {row["source"]: row["reason"] for row in rows(tmp_path / "out" / "wds", "errors")}
    assert set(reasons) == {
        f"cat/odd-{name}" for name in ("cut.jpg", "text.png", "empty.webp", "gone.png", "float.tif")
    }
    assert "truncated" in reasons["cat/odd-cut.jpg"].lower()
    assert reasons["cat/odd-text.png"] == "not an image that Pillow knows"
    assert "floating-point" in reasons["cat/odd-float.tif"]
    stored = {row["source"] for row in rows(tmp_path / "out" / "wds")}
    assert len(stored) == 24
    assert sum("fine" in name for name in stored) == 4


def test_too_many_bad_images_stop_it(src: Path, tmp_path: Path) -> None:
    for i in range(11):
        (src / "cat" / f"bad{i:02d}.png").write_text("this is no image")
    args = ("folder", src, tmp_path / "out", "--size", 8, "--format", "wds")
    result = run(*args)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "error: 11 of 31 images can't be read, first cat/bad00.png (not an image that Pillow "
        f"knows): raise --max-errors to go on without them, or mend them and remove "
        f"{tmp_path}/out/.partial to start over"
    )
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [".partial"]
    assert run(*args).stderr == result.stderr.splitlines(True)[-1]  # the same, and at once
    assert run(*args, "--max-errors", 0.5).returncode == 0
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["wds"]


def test_nothing_readable_is_an_error_however_few(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "src" / split / "a").mkdir(parents=True)
        (tmp_path / "src" / split / "a" / "1.png").touch()
    result = run("folder", tmp_path / "src", tmp_path / "out", "--size", 8, "--max-errors", 1)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "2 of 2 images can't be read" in result.stderr


def test_user_errors_are_one_sentence(src: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    picture(tmp_path / "flat" / "1.png")
    picture(tmp_path / "single" / "a" / "1.png")
    picture(tmp_path / "half" / "train" / "a" / "1.png")
    picture(tmp_path / "odd" / "train" / "a" / "1.png")
    picture(tmp_path / "odd" / "val" / "b" / "1.png")
    out = tmp_path / "out"
    size = ("--size", 8)
    cases = {
        ("folder", tmp_path / "nope", out, *size): "there is no folder",
        ("folder", tmp_path / "file", out, *size): "there is no folder",
        ("folder", tmp_path / "empty", out, *size): "no images that Pillow reads$",
        ("folder", tmp_path / "flat", out, *size): "val would be empty",
        ("folder", src, out, *size, "--max-passed-over", 2): "--max-passed-over is 2",
        ("folder", tmp_path / "single", out, *size): "val would be empty",
        ("folder", tmp_path / "half", out, *size): "has train/ but no val/",
        ("folder", tmp_path / "odd", out, *size): "a class that train lacks: b",
        ("folder", src, tmp_path / "file", *size): "can't write to",
        ("folder", src, tmp_path / "file" / "out", *size): "can't write to",
        ("folder", src, out): "--size is missing",
        ("folder", src, out, *size, "--encode", "keep"): "leave out --size",
        ("folder", src, out, "--size", 0): "--size is 0",
        ("folder", src, out, "--size", 100_000): "--size is 100000: give a side from 1 to 4096",
        ("folder", src, out, *size, "--workers", 10**6): "--workers is 1000000",
        ("folder", src, out, *size, "--workers", 0): "--workers is 0",
        ("folder", src, out, *size, "--val-fraction", 1.5): "--val-fraction is 1.5",
        ("folder", src, out, *size, "--max-errors", -1): "--max-errors is -1",
        ("digits", out, "--seed", -1): "--seed is -1",
    }
    for args, part in cases.items():
        with pytest.raises(UserError, match=part) as caught:
            main(list(map(str, args)))
        assert "\n" not in str(caught.value)
    assert not out.exists()
    result = run("folder", tmp_path / "nope", out, *size)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: there is no folder {tmp_path}/nope")


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        ([f"n{number:08d}" for number in range(1000)], "imagenet1k"),
        (["n01440764", "n02119789"], "imagenet"),
        (["n01440764", "tench"], "my-photos-2"),
    ],
)
def test_a_set_is_named_after_imagenet_or_its_folder(
    classes: list[str], name: str, tmp_path: Path
) -> None:
    assert set_name(tmp_path / "my photos.2", classes) == name
