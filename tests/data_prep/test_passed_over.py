"""Nothing vanishes: what is an image by its content is taken, all else is counted and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from data_prep.__main__ import main
from data_prep.images import prepare_image
from data_prep.settings import Settings
from data_prep.sources import Source, open_source
from tarflow_dist.errors import UserError

SUFFIXES = (
    *("avif", "bmp", "dds", "dib", "gif", "icns", "ico", "jp2", "jpg", "mpo", "msp", "pcx"),
    *("png", "ppm", "qoi", "sgi", "tga", "tif", "webp", "xbm"),
)
LOSSY = ("avif", "icns", "jpg", "mpo", "webp")  # an icon is stored resized
BLACK_AND_WHITE = ("msp", "xbm")


def source(src: Path) -> Source:
    return open_source(src, layout="folder", val_fraction=0.5, seed=0)


def names(src: Path) -> set[str]:
    return {item.name for item in source(src).items()}


def fill(folder: Path, count: int = 2) -> Path:
    """A folder with `count` pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (9, 9), (i, 90, 0)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_format_of_pillows_is_taken_with_its_pixels(suffix: str, tmp_path: Path) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    if suffix in BLACK_AND_WHITE:
        picture = picture.convert("1")
    file = fill(tmp_path / "a") / f"picture.{suffix}"
    options = {"save_all": True, "append_images": [picture]} if suffix == "mpo" else {}
    picture.save(file, {"mpo": "MPO", "jp2": "JPEG2000"}.get(suffix), **options)
    assert f"a/picture.{suffix}" in names(tmp_path)
    stored = prepare_image(file.read_bytes(), Settings(size=32, encode="raw"), channels=3)
    found = np.frombuffer(stored.data, np.uint8).reshape(32, 32, 3)
    apart = np.abs(found.astype(int) - np.asarray(picture.convert("RGB"))).max()
    assert apart <= (12 if suffix in LOSSY else 0)


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    picture = fill(tmp_path / "a") / "0.png"
    for name in ("no suffix", "named.txt", "named.jpg"):
        shutil.copy(picture, tmp_path / "a" / name)
    for name in ("text.txt", "more.TXT", "paper.pdf", "README", "script.ps", ".hidden.png"):
        (tmp_path / "a" / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n" * 9)
    (tmp_path / "a" / "model.npy").write_bytes(b"\0" * 16 + b"\x08" * 99)
    found = source(tmp_path)
    assert names(tmp_path) == {
        *(f"a/{name}" for name in ("0.png", "1.png", "no suffix", "named.txt", "named.jpg"))
    }
    kinds = {".txt": 2, ".pdf": 1, ".ps": 1, ".npy": 1, "hidden": 1, "without a suffix": 1}
    assert found.passed_over == kinds


def test_they_are_named_at_the_end_and_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    fill(src / "a", 20)
    fill(src / "c", 2)
    (src / "b").mkdir()
    for name in (*(f"a/{i}.txt" for i in range(9)), *(f"b/{i}.pdf" for i in range(3))):
        (src / name).write_text("no image")
    shutil.copy(src / "a" / "0.png", src)
    main(["folder", str(src), str(out), "--size", "8", "--workers", "1"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "13 files passed over: 9 .txt, 3 .pdf, 1 loose images",
        f"folders without images are no classes: b in {src}",
    ]
    summary = json.loads((out / "mds" / "summary.json").read_text())
    assert summary["passed_over"] == {".txt": 9, ".pdf": 3, "loose images": 1}
    assert summary["classes"] == ["a", "c"]


def test_a_folder_of_other_things_ends_the_run(tmp_path: Path) -> None:
    fill(tmp_path / "src" / "a")
    for i in range(3):
        (tmp_path / "src" / "a" / f"{i}.raw").write_text("no image")
    command = ["folder", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8", "--workers", "1"]
    with pytest.raises(UserError, match=r"2 images .* more else \(3 files passed over: 3 .raw\)"):
        main(command)
    assert not (tmp_path / "out").exists()
    main([*command, "--max-passed-over", "0.7"])
    assert (tmp_path / "out" / "mds").exists()


def test_a_folder_without_any_image_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.docx").write_text("no image")
    with pytest.raises(
        UserError, match=r"no images that Pillow reads: 1 file passed over: 1 .docx"
    ):
        source(tmp_path)


def test_a_class_of_which_no_image_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps its label."""
    fill(tmp_path / "src" / "a")
    fill(tmp_path / "src" / "c")
    (tmp_path / "src" / "b").mkdir()
    for i in range(2):
        (tmp_path / "src" / "b" / f"{i}.jpg").write_text("no image")
    main(["folder", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8", "--workers", "1"])
    assert capsys.readouterr().out.splitlines()[1:] == ["classes without an image in train: b"]
    labels = pq.read_table(tmp_path / "out" / "mds" / "manifest.parquet", columns=["label"])
    assert set(labels["label"].to_pylist()) == {0, 2}


def test_a_flat_folder_is_an_unconditional_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "src", 10)
    main(["folder", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8", "--workers", "1"])
    first, note = capsys.readouterr().out.splitlines()
    assert "9 train and 1 val images, 1 class, " in first
    assert note == "no class folders: an unconditional set, for model.num_classes=0"
    rows = pq.read_table(tmp_path / "out" / "mds" / "manifest.parquet").to_pylist()
    assert {row["source"] for row in rows} == {f"{i}.png" for i in range(10)}
    assert {row["label"] for row in rows} == {0}


SPLIT_PAIRS = [
    ("train", "val"),
    ("Train", "Test"),
    ("training", "testing"),
    ("train2017", "val2017"),
    ("train_64x64", "valid_64x64"),
]


@pytest.mark.parametrize(("train", "val"), SPLIT_PAIRS)
@pytest.mark.parametrize("inside", ["", "ant"])
def test_splits_are_not_taken_for_classes(
    train: str, val: str, inside: str, tmp_path: Path
) -> None:
    fill(tmp_path / train / inside, 3)
    fill(tmp_path / val / inside, 2)
    found = source(tmp_path)
    assert found.classes == [inside or "images"]
    splits = [(item.split, item.name.split("/")[0]) for item in found.items()]
    assert splits == [("train", train)] * 3 + [("val", val)] * 2


def test_what_lies_beside_the_splits_is_counted(tmp_path: Path) -> None:
    for name in ("train/a", "val/a", "test/a", "test/b"):
        fill(tmp_path / name)
    (tmp_path / "README.md").write_text("about")
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path)
    assert len(source(tmp_path)) == 4
    assert source(tmp_path).passed_over == {"in test/": 4, ".md": 1, "loose images": 1}


def half_flat(src: Path) -> None:
    fill(src / "train" / "a")
    fill(src / "val")


def two_years(src: Path) -> None:
    for name in ("train2014", "train2017", "val2014", "val2017"):
        fill(src / name)


def only_val(src: Path) -> None:
    fill(src / "valid" / "a")
    (src / "notes").mkdir()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (half_flat, "train and .*/val differ: only one has class folders"),
        (two_years, "has train2014 and train2017: give a folder with one for train"),
        (only_val, "has valid/ but no train/: give .*/valid to split it"),
    ],
)
def test_what_could_be_two_things_is_refused(
    make: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=said):
        source(tmp_path)


def test_a_class_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "src" / "cats, big")
    fill(tmp_path / "src" / " dog.")
    main(["folder", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8", "--workers", "1"])
    main(["show", f"{tmp_path}/out"])
    assert "classes       2:  dog., cats, big\n" in capsys.readouterr().out
