"""`python -m data_prep imagenet`: one ImageNet in every layout gives one set."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import HAVE_NAMES, LAYOUTS, NAMES, TRAIN, VAL, WNIDS
from PIL import Image
from streaming import LocalDataset
from torchvision.datasets import imagenet

from data_prep.__main__ import main
from data_prep.images import adm_crop, to_8bit
from data_prep.sources import Parquet, Source, open_source, read_image
from tarflow_dist.errors import UserError


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        layouts.WRITERS[layout](root / layout)
    return root


@pytest.fixture(scope="module")
def sets(roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each layout's set, found without being named."""
    out = tmp_path_factory.mktemp("sets")
    for layout in LAYOUTS:
        args = ["imagenet", str(roots / layout), str(out / layout)]
        main([*args, "--size", "16", "--format", "both", "--workers", "1"])
    return out


def shards(folder: Path) -> dict[str, bytes]:
    files = [file for split in ("train", "val") for file in (folder / split).iterdir()]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


def rows(folder: Path, table: str = "manifest") -> list[dict]:
    return pq.read_table(folder / f"{table}.parquet").to_pylist()


def source(path: Path, layout: str = "auto") -> Source:
    return open_source(path, layout=layout, val_fraction=0.1, seed=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["mds", "wds"])
def test_every_layout_gives_the_same_shards(sets: Path, layout: str, form: str) -> None:
    found = shards(sets / layout / form)
    assert len(found) == {"mds": 4, "wds": 2}[form]
    assert found == shards(sets / "folder" / form)
    summary = json.loads((sets / layout / form / "summary.json").read_text())
    assert summary["layout"] == layout
    assert summary["classes"] == WNIDS
    known = [NAMES[wnid] for wnid in WNIDS] if layout in HAVE_NAMES else None
    assert summary["class_names"] == known
    (bad,) = rows(sets / layout / form, "errors")
    assert bad["source"] == f"train/{WNIDS[1]}/{WNIDS[1]}_99.JPEG"
    assert bad["reason"] == "not an image that Pillow knows"
    assert summary["errors_per_class"]["train"] == [0, 1, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_set_holds_each_image_under_its_label(sets: Path, layout: str) -> None:
    expected = {
        f"train/{wnid}/{name}": (WNIDS.index(wnid), content)
        for wnid in WNIDS
        for name, content in TRAIN[wnid].items()
        if "_99" not in name
    } | {f"val/{wnid}/{name}": (WNIDS.index(wnid), file) for name, (wnid, file) in VAL.items()}
    mds = sets / layout / "mds"
    samples = {split: LocalDataset(str(mds / split)) for split in ("train", "val")}
    found = set()
    for row in rows(mds):
        label, content = expected[row["source"]]
        sample = samples[row["split"]][row["index"]]
        assert sample["y"] == row["label"] == label
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            pixels = np.asarray(adm_crop(to_8bit(image, 3), 16))
        assert np.array_equal(np.asarray(sample["x"]), pixels)
        assert (row["original_bytes"], row["original_width"]) == (len(content), size[0])
        assert row["class"] == WNIDS[label]
        assert row["class_name"] == (NAMES[WNIDS[label]] if layout in HAVE_NAMES else None)
        found.add(row["source"])
    assert found == set(expected)


def test_labels_are_torchvisions(
    roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision reads the devkit, too."""
    devkit = "ILSVRC2012_devkit_t12.tar.gz"
    shutil.copy(roots / "archives" / devkit, tmp_path)
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)
    imagenet.parse_devkit_archive(tmp_path)
    names, val_wnids = imagenet.load_meta_file(tmp_path)
    ours = source(roots / "archives")
    assert {wnid: ", ".join(words) for wnid, words in names.items()} == dict(
        zip(ours.classes, ours.class_names or (), strict=True)
    )
    val = {item.name.split("/")[-1]: item.label for item in ours.items() if item.split == "val"}
    assert [ours.classes[val[name]] for name in sorted(val)] == val_wnids


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_lists_its_images_once_and_in_one_order(roots: Path, layout: str) -> None:
    images, again = source(roots / layout), source(roots / layout)
    names = [item.name for item in images.items()]
    assert len(names) == len(images) == len(set(names))
    assert names == [item.name for item in again.items()]
    assert images.fingerprint() == again.fingerprint()


def test_an_archive_is_not_unpacked(roots: Path) -> None:
    """An item says where its bytes lie in the archive."""
    item = next(source(roots / "archives").items())
    archive = (roots / "archives" / item.place.file).read_bytes()
    content = archive[item.place.offset :][: item.place.size]
    assert content == TRAIN[WNIDS[0]][item.name.split("/")[-1]]


def table(file: Path, images: list, labels: list, names: list[str] | None = None) -> None:
    features = {"label": {"_type": "ClassLabel", "names": names}}
    about = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=about)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(images, kind), "label": labels}, schema), file)


@pytest.mark.parametrize("names", [None, ["zebra", "ant", "unused"]])
def test_other_parquet_sets(tmp_path: Path, names: list[str] | None) -> None:
    """Labels stay what they are; without paths, an image is called after its row."""
    images = [{"bytes": b"a", "path": "x/a.png"}, {"bytes": b"b", "path": None}, None]
    table(tmp_path / "train-0.parquet", images, [1, 0, None], names)
    table(tmp_path / "validation.parquet", [{"bytes": None, "path": None}], [0], names)
    source = Parquet(tmp_path)
    assert list(source.classes) == (names or ["0", "1"])
    assert source.class_names is None
    assert [(i.split, i.label, i.name, read_image(tmp_path, i.place)) for i in source.items()] == [
        ("train", 1, f"train/{source.classes[1]}/x/a.png", b"a"),
        ("train", 0, "train/train-0.parquet/0/1", b"b"),
        ("val", 0, "val/validation.parquet/0/0", None),
    ]


def without(name: str) -> Callable[[Path], None]:
    return lambda root: next(root.rglob(name)).unlink()


def cut(name: str, length: int) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        file = next(root.rglob(name))
        file.write_bytes(file.read_bytes()[:length])

    return damage


def fewer_classes(root: Path) -> None:
    file = root / "ILSVRC2012_img_train.tar"
    with tarfile.open(file) as tar:
        first = tar.next()
        assert first is not None
        inner = tar.extractfile(first)
        assert inner is not None
        content = inner.read()
    with tarfile.open(file, "w") as tar:
        first.size = len(content)
        tar.addfile(first, io.BytesIO(content))


def fewer_labels(root: Path) -> None:
    file = root / "LOC_val_solution.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")


def without_val(root: Path) -> None:
    shutil.rmtree(root / "ILSVRC" / "Data" / "CLS-LOC" / "val")


def odd_labels(root: Path) -> None:
    table(root / "data" / "train-00000-of-00002.parquet", [{"bytes": b"", "path": "a"}], [9])


def other_columns(root: Path) -> None:
    pq.write_table(pa.table({"pixels": [1]}), root / "data" / "train-00000-of-00002.parquet")


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("archives", without("ILSVRC2012_img_val.tar"), "has no ILSVRC2012_img_val.tar"),
    ("archives", without("*devkit*"), "has no ILSVRC2012_devkit_t12.tar.gz"),
    ("archives", cut("*devkit*", 300), "is damaged or no devkit"),
    ("archives", cut("*train.tar", 9_000), "archives in .* are damaged"),
    ("archives", cut("*val.tar", 9_000), "archives in .* are damaged"),
    ("archives", cut("*val.tar", 0), "archives in .* are damaged"),
    ("archives", fewer_classes, "lacks 3 of the devkit's 4 classes, first n01440764"),
    ("kaggle", without("LOC_val_solution.csv"), "LOC_val_solution.csv, which is needed"),
    ("kaggle", cut("LOC_val_solution.csv", 10), "does not label ILSVRC2012_val_00000001"),
    ("kaggle", fewer_labels, "does not label ILSVRC2012_val_"),
    ("kaggle", cut("LOC_synset_mapping.txt", 29), "disagree about n02119789"),
    ("kaggle", without_val, "can't read .*/CLS-LOC/val: No such file"),
    ("parquet", cut("train-00001*", 900), "parquet files in .* can't be read"),
    ("parquet", without("validation*"), r"has no files validation-\*.parquet"),
    ("parquet", odd_labels, "labels go from 0 to 9, with 4 classes"),
    ("parquet", other_columns, "no columns image and label"),
    ("arrow", cut("data-00000-of-00004.arrow", 900), "arrow files in .* can't be read"),
    ("arrow", without("data-00000-of-00004.arrow"), "arrow files in .* can't be read"),
    ("arrow", without("train/state.json"), "is not whole as save_to_disk writes it"),
    ("arrow", cut("dataset_dict.json", 5), "is not whole as save_to_disk writes it"),
]


@pytest.mark.parametrize(("layout", "damage", "said"), BROKEN)
def test_a_broken_layout_is_one_sentence(
    roots: Path, tmp_path: Path, layout: str, damage: Callable[[Path], None], said: str
) -> None:
    root = tmp_path / layout
    shutil.copytree(roots / layout, root)
    damage(root)
    with pytest.raises(UserError, match=said) as caught:
        source(root)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_damaged_among_its_images(roots: Path, tmp_path: Path) -> None:
    shutil.copytree(roots / "parquet", tmp_path / "src")
    file = tmp_path / "src" / "data" / "train-00001-of-00002.parquet"
    group = pq.ParquetFile(file).metadata.row_group(1)
    (place,) = (
        column.data_page_offset
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema == "image.bytes"
    )
    with file.open("r+b") as damaged:
        damaged.seek(place)
        damaged.write(b"\xff" * 100)
    source(tmp_path / "src")  # labels and paths are whole
    with pytest.raises(UserError, match=f"{file} is damaged .*: fetch it again"):
        main(["imagenet", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8", "--workers", "1"])
    assert not (tmp_path / "out" / "mds").exists()


def test_two_layouts_in_one_folder(roots: Path, tmp_path: Path) -> None:
    for layout in ("archives", "parquet"):
        shutil.copytree(roots / layout, tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(UserError, match="holds archives and parquet: choose one with --layout"):
        source(tmp_path / "both")
    assert source(tmp_path / "both", "parquet").layout == "parquet"


def test_a_labelled_image_that_is_not_there_is_listed(roots: Path, tmp_path: Path) -> None:
    shutil.copytree(roots / "kaggle", tmp_path / "src")
    next(tmp_path.rglob("ILSVRC2012_val_00000003.JPEG")).unlink()
    main(["imagenet", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8", "--workers", "1"])
    reasons = {row["source"][-13:]: row["reason"] for row in rows(tmp_path / "out/mds", "errors")}
    assert reasons["00000003.JPEG"] == "not there"


@pytest.fixture(scope="module")
def kept(roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept")
    args = ["imagenet", str(roots / "archives"), str(out), "--workers", "1"]
    main([*args, "--encode", "keep", "--format", "both"])
    return out


@pytest.mark.parametrize("form", ["mds", "wds"])
def test_keep_passes_the_files_through(kept: Path, form: str) -> None:
    files = {f"train/{wnid}/{name}": file for wnid in WNIDS for name, file in TRAIN[wnid].items()}
    files |= {f"val/{wnid}/{name}": file for name, (wnid, file) in VAL.items()}
    manifest = rows(kept / form)
    for row in manifest:
        stored = (kept / form / row["shard"]).read_bytes()[row["offset"] :][: row["bytes"]]
        assert stored == files[row["source"]]
    assert {row["kind"] for row in manifest} == {"jpg", "png", "bmp", "gif"}
    assert json.loads((kept / form / "summary.json").read_text())["image_size"] is None


def test_kept_files_open_in_streaming(kept: Path) -> None:
    for sample in LocalDataset(str(kept / "mds" / "val")):
        sample["x"].load()
