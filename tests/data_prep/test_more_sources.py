"""Sets in other people's formats give the pixels and labels that an independent reader gives."""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image
from streaming import LocalDataset, MDSWriter

from data_prep.__main__ import main
from data_prep.images import prepare_image
from data_prep.settings import Settings
from data_prep.sources import Source, open_source, read_image
from tarflow_dist.errors import UserError

RNG = np.random.default_rng(0)


def source(path: Path, layout: str = "auto") -> Source:
    found = open_source(path, layout=layout, val_fraction=0.25, seed=0)
    assert layout in ("auto", found.layout)
    return found


def pixels(found: Source) -> dict[str, list[tuple[int, bytes]]]:
    """By split: label and RGB pixels of each image, in the source's order."""
    prepared: dict[str, list[tuple[int, bytes]]] = {"train": [], "val": []}
    for item in found.items():
        content = read_image(found.path, item.place)
        stored = prepare_image(content, Settings(size=8, encode="raw"), channels=3)
        prepared[item.split].append((item.label, stored.data))
    return prepared


def check_names(found: Source) -> None:
    names = [item.name for item in found.items()]
    assert len(names) == len(found) == len(set(names))


class Trap:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("it was unpickled",)


def published_reader(data: np.ndarray, size: int) -> np.ndarray:
    """As in the authors' script: (n, size, size, 3)."""
    area = size * size
    planes = np.dstack((data[:, :area], data[:, area : 2 * area], data[:, 2 * area :]))
    return planes.reshape(len(data), size, size, 3)


def write_npz(root: Path, save: object = np.savez) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for split, name in (
        ("train", "part1/train_data_batch_1"),
        ("train", "part1/train_data_batch_2"),
        ("val", "val_data"),
    ):
        data = RNG.integers(0, 256, (5, 192), dtype=np.uint8)
        labels = RNG.integers(1, 8, 5)
        (root / name).parent.mkdir(exist_ok=True)
        save(root / name, data=data, labels=labels, mean=data.mean(0))  # type: ignore[operator]
        yield split, data, labels


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_downsampled_imagenet(save: object, tmp_path: Path) -> None:
    expected: dict[str, list] = {"train": [], "val": []}
    for split, data, labels in write_npz(tmp_path, save):
        images = published_reader(data, 8)
        expected[split] += [(y - 1, x.tobytes()) for x, y in zip(images, labels, strict=True)]
    found = source(tmp_path)
    assert found.layout == "npz"
    assert pixels(found) == expected
    check_names(found)


def test_a_batch_that_is_missing(tmp_path: Path) -> None:
    list(write_npz(tmp_path))
    (tmp_path / "part1" / "train_data_batch_1.npz").unlink()
    with pytest.raises(UserError, match=r"has no train_data_batch_1.npz.*: fetch it again"):
        source(tmp_path)


def test_pickled_labels_are_refused(tmp_path: Path) -> None:
    list(write_npz(tmp_path))
    labels = np.array([Trap()], object)
    np.savez(tmp_path / "val_data", data=np.zeros((1, 192), np.uint8), labels=labels)
    with pytest.raises(UserError, match=r"val_data.npz can't be read \(Object arrays"):
        source(tmp_path)


@pytest.mark.parametrize("label", [0, 1 << 40, 1.5])
def test_labels_that_are_none(label: float, tmp_path: Path) -> None:
    list(write_npz(tmp_path))
    np.savez(tmp_path / "val_data", data=np.zeros((1, 192), np.uint8), labels=np.array([label]))
    with pytest.raises(UserError, match="its labels are not whole numbers from 1 on"):
        source(tmp_path)


@pytest.mark.parametrize("wrong", ["shape", "type", "cut"])
def test_a_damaged_batch(wrong: str, tmp_path: Path) -> None:
    list(write_npz(tmp_path))
    file = tmp_path / "val_data.npz"
    if wrong == "cut":
        content = bytearray(file.read_bytes())
        content[300] ^= 1  # among the pixels: the checksum tells
        file.write_bytes(content)
    else:
        data = np.zeros((5, 192 if wrong == "type" else 191), np.uint8 if wrong == "shape" else int)
        np.savez(file, data=data, labels=np.ones(5, int))
    with pytest.raises(UserError, match=r"val_data.npz can't be read \(.*fetch it again"):
        list(source(tmp_path).items())


def picture(kind: str) -> bytes:
    file = BytesIO()
    pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def decoded(content: bytes) -> bytes:
    with Image.open(BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).tobytes()


def write_tar(file: Path, samples: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(file), encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    return file


LABELS = {
    "cls": lambda label: {"cls": str(label).encode()},
    "json": lambda label: {"json": json.dumps({"label": label}).encode()},
    "both": lambda label: {"cls": str(label).encode(), "json": b'{"caption": "a cat"}'},
}


@pytest.mark.parametrize("labelled", LABELS)
@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp"])
def test_webdataset_tars(labelled: str, kind: str, tmp_path: Path) -> None:
    """Against the webdataset library, which wrote them, too."""
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    tars = ["set-train-000000.tar", "set-train-000001.tar", "set-val-000000.tar"]
    for tar in tars:
        samples = [
            {"__key__": f"{i:04d}", kind: picture(kinds.get(kind, "JPEG")), **LABELS[labelled](i)}
            for i in range(3)
        ]
        write_tar(tmp_path / tar, samples)
    expected: dict[str, list] = {"train": [], "val": []}
    for tar in tars:
        for sample in webdataset.WebDataset(str(tmp_path / tar), shardshuffle=False):
            label = sample.get("cls") or json.loads(sample["json"])["label"]
            expected[tar.split("-")[1]].append((int(label), decoded(sample[kind])))
    found = source(tmp_path)
    assert (found.layout, found.classes) == ("wds", ["0", "1", "2"])
    assert pixels(found) == expected
    check_names(found)


def test_tars_without_val_give_a_share_of_each_class(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{i:04d}", "png": picture("PNG"), "cls": str(i % 2).encode()} for i in range(8)
    ]
    write_tar(tmp_path / "00000.tar", [{**s, "txt": b"a caption"} for s in samples])
    write_tar(tmp_path / "00001.tar", [{"__key__": "a", "png": b"", "json": b"[]"}])
    found = source(tmp_path)
    assert found.notes == ["no tars for val: a share of each class is held out"]
    assert found.passed_over == {".txt": 8, "without a label": 1}
    assert [label for label, _ in sorted(pixels(found)["val"])] == [0, 1]
    assert len(pixels(found)["train"]) == 6


def test_class_names_in_a_tar(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        samples = [
            {"__key__": name, "png": picture("PNG"), "json": json.dumps(about).encode()}
            for name, about in {
                "a": {"label": 1, "class_name": "cats, big"},
                "b": {"label": 0, "class_name": "dog"},
            }.items()
        ]
        write_tar(tmp_path / split / "0.tar", samples)
    assert source(tmp_path).classes == ["dog", "cats, big"]


def test_a_class_of_two_names_does_not_shift_the_others(tmp_path: Path) -> None:
    """As many names as labels, but none of label 1."""
    abouts = [(0, "ant"), (0, "bee"), (2, "cat")] * 2
    samples = [
        {"__key__": f"{i}", "png": b"", "json": json.dumps({"label": y, "class": name}).encode()}
        for i, (y, name) in enumerate(abouts)
    ]
    write_tar(tmp_path / "train.tar", samples)
    assert source(tmp_path).classes == ["0", "1", "2"]


def test_damaged_tars(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "whole" / "train.tar", [{"__key__": "a", "png": picture("PNG"), "cls": b"0"}]
    ).read_bytes()
    for name, content, said in (
        ("cut", whole[:700], "is damaged or no WebDataset tar"),
        ("rubbish", b"rubbish" * 999, "is damaged or no WebDataset tar"),
        (
            "words",
            write_tar(
                tmp_path / "words.tar", [{"__key__": "a", "png": b"", "cls": b"cat"}]
            ).read_bytes(),
            "is damaged or no WebDataset tar .*invalid literal",
        ),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tar").write_bytes(content)
        with pytest.raises(UserError, match=said):
            source(tmp_path / name)


def test_other_tars_beside_class_folders_are_passed_over(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture("PNG"))
    write_tar(tmp_path / "backup.tar", [{"__key__": "a/0", "png": picture("PNG")}] * 3)
    assert source(tmp_path).layout == "folder"
    assert source(tmp_path).passed_over == {".tar": 1}


COLUMNS = {  # of MosaicML's: those of their ImageNet, their CIFAR-10, and others
    "imagenet": ({"i": "int", "x": "jpeg", "y": "int"}, "JPEG"),
    "cifar": ({"i": "int", "x": "pil", "y": "int"}, None),
    "others": ({"caption": "str", "image": "png", "label": "int32", "aux": "pkl"}, "PNG"),
    "pixels": ({"x": "ndarray:uint8:8,8,3", "y": "uint8"}, None),
}


def write_mds(folder: Path, columns: dict[str, str], samples: list, **options: Any) -> None:
    with MDSWriter(columns=columns, out=str(folder), size_limit=900, **options) as out:
        for i, (label, image) in enumerate(samples):
            of_kind = {"int": i, "str": "a cat", "pkl": Trap}
            sample = {name: of_kind.get(kind) for name, kind in columns.items()}
            image_column, label_column = ("x", "y") if "x" in columns else ("image", "label")
            out.write(sample | {image_column: image, label_column: label})


@pytest.mark.parametrize("compression", [None, "zstd:3"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_mds_shards(
    columns: str, compression: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the streaming library, which wrote them, too."""
    names, kind = COLUMNS[columns]
    theirs = {}
    for split, count in (("train", 7), ("val", 4)):
        images: list[Any] = [picture(kind or "PNG") for _ in range(count)]
        if not kind:
            images = [Image.open(BytesIO(image)).convert("RGB") for image in images]
        if columns == "pixels":
            images = [np.asarray(image) for image in images]
        samples = [(i % 3, image) for i, image in enumerate(images)]
        if columns == "others":
            samples = [(np.int32(label), image) for label, image in samples]
        if columns == "pixels":
            samples = [(np.uint8(label), image) for label, image in samples]
        write_mds(tmp_path / "set" / split, names, samples, compression=compression)
        write_mds(tmp_path / "plain" / split, names, samples)
        theirs[split] = list(LocalDataset(str(tmp_path / "plain" / split)))
    found = source(tmp_path / "set")
    assert (found.layout, found.classes) == ("mds", ["0", "1", "2"])
    check_names(found)
    monkeypatch.setattr(pickle, "loads", pytest.fail)
    assert pixels(found) == {
        split: [
            (int(s.get("y", s.get("label"))), np.asarray(s.get("x", s.get("image"))).tobytes())
            for s in samples
        ]
        for split, samples in theirs.items()
    }


def test_a_damaged_compressed_shard(tmp_path: Path) -> None:
    samples = [(0, picture("JPEG"))] * 3
    write_mds(tmp_path, COLUMNS["imagenet"][0], samples, compression="zstd:3")
    (tmp_path / "shard.00000.mds.zstd").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"shard 0 of .*index.json can't be read .*: fetch it"):
        source(tmp_path)


def test_our_own_sets_keep_their_classes(tmp_path: Path) -> None:
    for i, name in enumerate(["ant", "ant", "cats, big", "cats, big"]):
        (tmp_path / "src" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name / f"{i}.png").write_bytes(picture("PNG"))
    command = ["folder", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8", "--workers", "1"]
    main([*command, "--format", "both"])
    for form in ("mds", "wds"):
        assert source(tmp_path / "out" / form).classes == ["ant", "cats, big"]
        ours, before = pixels(source(tmp_path / "out" / form)), pixels(source(tmp_path / "src"))
        assert sorted(ours["train"] + ours["val"]) == sorted(before["train"] + before["val"])


def test_a_split_alone_gives_a_share_of_each_class(tmp_path: Path) -> None:
    samples = [(i % 2, picture("JPEG")) for i in range(8)]
    write_mds(tmp_path / "train", COLUMNS["imagenet"][0], [*samples, (-1, samples[0][1])])
    for path in (tmp_path, tmp_path / "train"):
        found = source(path)
        assert found.notes == ["no folder for val: a share of each class is held out"]
        assert found.passed_over == {"without a label": 1}
        assert sorted(label for label, _ in pixels(found)["val"]) == [0, 1]
        assert len(found) == 8
        check_names(found)


def cut_shard(index: dict, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-9])


def other_count(index: dict, shard: Path) -> None:
    index["shards"][0]["samples"] += 1


def out_of_its_folder(index: dict, shard: Path) -> None:
    index["shards"][0]["raw_data"]["basename"] = "../secret"


def other_format(index: dict, shard: Path) -> None:
    index["shards"][0]["format"] = "json"


def other_columns(index: dict, shard: Path) -> None:
    index["shards"][0]["column_names"] = ["i", "tokens", "y"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_shard, "holds not the . samples of its index"),
        (other_count, "holds not the . samples of its index"),
        (out_of_its_folder, "leads out of its folder"),
        (other_format, "its format is json, and not mds"),
        (other_columns, "its columns are i, tokens, y: none for the image or the label"),
    ],
)
def test_damaged_shards(damage: Callable[[dict, Path], None], said: str, tmp_path: Path) -> None:
    write_mds(tmp_path, COLUMNS["imagenet"][0], [(0, picture("JPEG"))] * 3)
    index = json.loads((tmp_path / "index.json").read_text())
    damage(index, tmp_path / "shard.00000.mds")
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"can't be read \(.*{said}.*: fetch it again"):
        source(tmp_path, "mds")


def write_zip(
    file: Path, labels: list | None, count: int = 8, compression: int = zipfile.ZIP_STORED
) -> Path:
    """As EDM's dataset_tool.py does it."""
    names = [f"{i // 3:05d}/img{i:08d}.png" for i in range(count)]
    about = labels and [[name, label] for name, label in zip(names, labels, strict=False)]
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in names:
            archive.writestr(name, picture("PNG"))
        archive.writestr("dataset.json", json.dumps({"labels": about}))
    return file


def edms_reader(file: Path) -> list[tuple[int, bytes]]:
    """As ImageFolderDataset in EDM's training/dataset.py."""
    with zipfile.ZipFile(file) as archive:
        names = sorted(n for n in archive.namelist() if Path(n).suffix == ".png")
        labels = json.loads(archive.read("dataset.json"))["labels"]
        numbers = dict(labels) if labels is not None else dict.fromkeys(names, 0)
        return [(numbers[name], decoded(archive.read(name))) for name in names]


@pytest.mark.parametrize("labels", [None, [2, 0, 1, 1, 2, 0, 0, 2]])
@pytest.mark.parametrize("unpacked", [False, True])
def test_edms_zips(labels: list | None, unpacked: bool, tmp_path: Path) -> None:
    file = write_zip(tmp_path / "imagenet-8x8.zip", labels)
    expected = edms_reader(file)
    path = file
    if unpacked:
        path = tmp_path / "folder"
        with zipfile.ZipFile(file) as archive:
            archive.extractall(path)
    found = source(path)
    assert found.layout == "edm"
    assert found.classes == (["0", "1", "2"] if labels else ["images"])
    ours = pixels(found)
    assert sorted(ours["train"] + ours["val"]) == sorted(expected)
    assert sorted({label for label, _ in ours["val"]}) == ([0, 1, 2] if labels else [0])
    check_names(found)
    if not unpacked:
        assert source(tmp_path).fingerprint() == found.fingerprint()


def test_a_zip_for_each_split(tmp_path: Path) -> None:
    train = write_zip(tmp_path / "set-train.zip", [0, 1, 1], 3)
    val = write_zip(tmp_path / "set-val.zip", [1, 0], 2)
    assert pixels(source(tmp_path)) == {"train": edms_reader(train), "val": edms_reader(val)}


@pytest.mark.parametrize(
    ("labels", "compression", "said"),
    [
        ([0, 1, 2], zipfile.ZIP_DEFLATED, "compressed or locked: unpack it, give the folder"),
        ([0, 1, [0.5, 0.5]], zipfile.ZIP_STORED, r"label of .* is \[0.5, 0.5\], and not a number"),
        ([0, 1, -1], zipfile.ZIP_STORED, "is -1, and not a number"),
    ],
)
def test_odd_zips(labels: list, compression: int, said: str, tmp_path: Path) -> None:
    file = write_zip(tmp_path / "set.zip", labels, 3, compression)
    with pytest.raises(UserError, match=said):
        source(file)


def test_zips_that_are_damaged_or_lack_something(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "set.zip", [0, 0, 0, 1], 5)
    assert source(file).passed_over == {"without a label": 1}
    content = file.read_bytes()
    file.write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"set.zip can't be read .*: fetch it again"):
        source(tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": [["a.png", 0]]}))
    with pytest.raises(UserError, match=r"lacks 1 of the images .* labels, first a\.png"):
        source(file)


def test_a_saved_split_alone(tmp_path: Path) -> None:
    """Of CIFAR's columns, its label's names in the metadata; against pyarrow and Pillow."""
    names = ["cats, big", "dog"]
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    images = [{"bytes": picture("PNG"), "path": None} for _ in range(8)]
    table = pa.table({"img": images, "label": [0, 1] * 4})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    found = source(tmp_path)
    assert (found.layout, found.classes) == ("arrow", names)
    assert found.notes == ["no split for val: a share of each class is held out"]
    ours = pixels(found)
    assert sorted(label for label, _ in ours["val"]) == [0, 1]
    assert sorted(ours["train"] + ours["val"]) == sorted(
        (label, decoded(image["bytes"])) for label, image in zip([0, 1] * 4, images, strict=True)
    )
    check_names(found)


def test_images_beside_a_packed_set_are_counted(tmp_path: Path) -> None:
    list(write_npz(tmp_path))
    assert source(tmp_path).passed_over == {}
    for name in ("sheet.png", "more/a/0.png", "more/a/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture("PNG"))
    assert source(tmp_path).passed_over == {"images beside": 3}


def test_a_folder_that_is_taken_for_something_else(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture("PNG"))
    (tmp_path / "dataset.json").write_text('{"version": 3}')
    with pytest.raises(UserError, match="; if it is no edm set, choose another --layout"):
        source(tmp_path)
    assert source(tmp_path, "folder").classes == ["a"]
