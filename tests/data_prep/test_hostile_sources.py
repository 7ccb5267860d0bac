"""Sources as strangers, networks and their disks hand them over: what is wrong with an image is set
aside, what is wrong with the system ends the run and is gone on with."""

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import encode
from data_prep.__main__ import main
from data_prep.sources import Archives, Folder, Kaggle, Parquet, open_source, storage
from data_prep.verify import verify
from tarflow_dist.errors import UserError

CLASSES = ("ant", "bee")


@pytest.fixture
def src(tmp_path: Path) -> Path:
    for i in range(12):
        file = tmp_path / "src" / CLASSES[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(file)
    return tmp_path / "src"


def command(src: Path, out: Path) -> list[str]:
    return ["folder", str(src), str(out), "--size", "8", "--workers", "1"]


def reasons(out: Path) -> dict[str, str]:
    rows = pq.read_table(out / "mds" / "errors.parquet").to_pylist()
    return {row["source"]: row["reason"] for row in rows}


def contents(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file() and file.name != "timing.json")
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


def test_what_is_no_file_is_set_aside_and_never_read(src: Path, tmp_path: Path) -> None:
    os.mkfifo(src / "ant" / "pipe.jpg")
    (src / "ant" / "zero.jpg").symlink_to("/dev/zero")
    (src / "ant" / "nowhere.jpg").symlink_to("gone")
    main(command(src, tmp_path / "out"))
    assert reasons(tmp_path / "out") == {
        "ant/pipe.jpg": "it is not a regular file",
        "ant/zero.jpg": "it is not a regular file",
        "ant/nowhere.jpg": "not there",
    }


@pytest.mark.parametrize("layout", ["archives", "kaggle", "parquet"])
def test_layouts_files_that_are_pipes(layout: str, tmp_path: Path) -> None:
    layouts.WRITERS[layout](tmp_path / "src")
    names = {"archives": "*devkit*", "kaggle": "LOC_val_solution.csv", "parquet": "train-*"}
    file = next((tmp_path / "src").rglob(names[layout]))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"regular file|has no ILSVRC2012_devkit"):
        main(["imagenet", f"{tmp_path}/src", f"{tmp_path}/out", "--size", "8"])


def test_folders_behind_links_are_read_once_and_circles_end(src: Path, tmp_path: Path) -> None:
    shutil.move(src / "bee", tmp_path / "elsewhere")
    (src / "bee").symlink_to(tmp_path / "elsewhere")
    (src / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (src / "ant" / "circle").symlink_to(src / "ant")
    (tmp_path / "elsewhere" / "up").symlink_to(src)
    names = [item.name for item in Folder(src).items()]
    assert len(names) == len(set(names))
    direct = {f"ant/{i:02d}.png" for i in range(0, 12, 2)}
    linked = {f"{above}/{i:02d}.png" for i in range(1, 12, 2) for above in ("ant/more", "bee")}
    assert direct | linked <= set(names)


@pytest.mark.parametrize("kind", ["folders", "images"])
def test_names_that_collide_are_refused(kind: str, src: Path) -> None:
    """Two names that differ in bytes that are no UTF-8."""
    for byte in (b"\xe4", b"\xe9"):
        name = os.fsdecode(b"caf" + byte)
        file = src / name / "1.png" if kind == "folders" else src / "ant" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        shutil.copy(src / "ant" / "00.png", file)
    with pytest.raises(UserError, match=r"two .* that are both called caf\ufffd.*: rename one"):
        open_source(src, layout="folder", val_fraction=0.1, seed=0)


def repeat_a_class(root: Path) -> None:
    archive = root / "ILSVRC2012_img_train.tar"
    with tarfile.open(archive) as tar:
        first = tar.next()
        assert first is not None
        file = tar.extractfile(first)
        assert file is not None
        content = file.read()
    first.name = f"again/{first.name}"
    with tarfile.open(archive, "a") as tar:
        tar.addfile(first, BytesIO(content))


def repeat_an_image(root: Path) -> None:
    archive = root / "ILSVRC2012_img_val.tar"
    member = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
    with tarfile.open(archive, "a") as tar:
        tar.addfile(member, BytesIO())


def repeat_a_label(root: Path) -> None:
    file = root / "LOC_val_solution.csv"
    file.write_text(file.read_text() + file.read_text().splitlines()[-1] + "\n")


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        (Archives, repeat_a_class, "has two classes that are both called n0"),
        (Archives, repeat_an_image, "has 13 images, and the devkit labels 12"),
        (Kaggle, repeat_a_label, "labels two images that are both called ILSVRC2012_val_"),
    ],
)
def test_packed_layouts_that_say_a_thing_twice(
    kind: type, damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    layouts.WRITERS[kind.__name__.lower()](tmp_path / "src")
    damage(tmp_path / "src")
    with pytest.raises(UserError, match=said):
        kind(tmp_path / "src")


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES, errno.ENOMEM]
)
def test_a_passing_read_error_leaves_no_trace(
    number: int, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(command(src, tmp_path / "whole"))
    failures = {"ant/04.png": 2, "bee/07.png": 3}
    whole = storage.read_regular

    def failing(file: Path) -> bytes:
        name = file.relative_to(src).as_posix()
        if failures.get(name):
            failures[name] -= 1
            raise OSError(number, os.strerror(number), str(file))
        return whole(file)

    monkeypatch.setattr(storage, "read_regular", failing)
    monkeypatch.setattr(storage, "WAITS", (0, 0, 0))
    main(command(src, tmp_path / "out"))
    assert not any(failures.values())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_vanishes_ends_the_run_which_goes_on(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(command(src, tmp_path / "whole"))
    monkeypatch.setattr(storage, "WAITS", (0, 0, 0))
    original = encode.prepare_image

    def vanish(*args: object, **kwargs: object) -> object:
        if (src / "bee").exists():
            (src / "bee").rename(src.parent / "away")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "prepare_image", vanish)
        with pytest.raises(UserError, match=r"can't read .*/bee/\d\d.png \(No such file .*goes on"):
            main(command(src, tmp_path / "out"))
    (src.parent / "away").rename(src / "bee")
    main(command(src, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_little_memory_is_no_fault_of_the_image(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: object, **kwargs: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(encode, "prepare_image", no_memory)
        with pytest.raises(UserError, match="the same command goes on, with fewer --workers"):
            main(command(src, tmp_path / "out"))
    main(command(src, tmp_path / "out"))
    assert reasons(tmp_path / "out") == {}


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9, 0.999])
def test_a_bit_of_the_devkit(place: float, tmp_path: Path) -> None:
    """It is found before scipy meets it, whose loadmat crashes on some."""
    layouts.write_archives(tmp_path / "src")
    file = tmp_path / "src" / "ILSVRC2012_devkit_t12.tar.gz"
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged.*fetch it again"):
        Archives(tmp_path / "src")


def refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system lets nobody open files of that name, as if they were another user's."""

    def refusing(original: Callable) -> Callable:
        def opened(file: object, *args: object, **kwargs: object) -> object:
            if str(file).endswith(name):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return original(file, *args, **kwargs)

        return opened

    monkeypatch.setattr(os, "open", refusing(os.open))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("archives", "ILSVRC2012_devkit_t12.tar.gz"),
        ("archives", "ILSVRC2012_img_train.tar"),
        ("kaggle", "LOC_synset_mapping.txt"),
        ("parquet", "train-00000-of-00002.parquet"),
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    layout: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts.WRITERS[layout](tmp_path / "src")
    refuse(name, monkeypatch)
    with pytest.raises(UserError, match=f"can't read .*{name}.*Permission denied") as caught:
        open_source(tmp_path / "src", val_fraction=0.1, seed=0)
    assert "damaged" not in str(caught.value)


def test_checksums_are_read_patiently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train_data_batch_1", "val_data"):
        np.savez(tmp_path / name, data=np.zeros((2, 192), np.uint8), labels=np.ones(2, int))
    source = open_source(tmp_path, val_fraction=0.1, seed=0)
    refuse("val_data.npz", monkeypatch)
    monkeypatch.setattr(storage, "WAITS", (0, 0, 0))
    with pytest.raises(UserError, match=r"can't read .*val_data.npz \(Permission .*once it can be"):
        source.items()


@pytest.mark.parametrize("name", ["summary.json", "train/index.json", "shard.00000.mds"])
def test_verify_tells_no_permission_from_damage(
    name: str, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(command(src, tmp_path / "out"))
    refuse(name, monkeypatch)
    lines = list(verify(tmp_path / "out"))
    assert lines
    assert all("permission denied" in line and "damaged" not in line for line in lines)


BYTES, PATHS = pa.struct([("bytes", pa.binary())]), pa.struct([("path", pa.string())])
ABOUT = {
    "no_names": {"info": {"features": {"label": {"names": 7}}}},
    "a_list": [],
    "numbers": {"info": {"features": {"label": {"names": [1, 2]}}}},
}
ODD_TABLES: list[tuple[pa.Table, str]] = [
    (pa.table({"image": pa.array([], BYTES), "label": pa.array([], pa.int64())}), "no row has a"),
    (pa.table({"image": pa.array([{}], BYTES), "label": pa.array([None], pa.int64())}), "no row"),
    (pa.table({"image": pa.array([{}], BYTES), "label": ["cat"]}), "label is string, and not"),
    (pa.table({"image": pa.array([{}], BYTES), "label": [0.5]}), "label is double, and not whole"),
    (pa.table({"image": pa.array([{}], BYTES), "label": [10**12]}), "labels go from 10000"),
    (pa.table({"image": pa.array([{}], BYTES), "label": [-7]}), "labels go from -7"),
    (
        pa.table({"image": pa.array([{}], BYTES), "label": pa.array([2**64 - 1], pa.uint64())}),
        "can't be read: .*out of range|out of bounds|not in range",
    ),
    (pa.table({"image": pa.array([{}], PATHS), "label": [0]}), "and not the files' bytes"),
    (pa.table({"image": ["a.png"], "label": [0]}), "image is string, and not the files' bytes"),
    *(
        (
            pa.table({"image": pa.array([{}], BYTES), "label": [0]}).replace_schema_metadata(
                {"huggingface": json.dumps(about)}
            ),
            "their metadata",
        )
        for about in ABOUT.values()
    ),
    (
        pa.table({"image": pa.array([{}], BYTES), "label": [0]}).replace_schema_metadata(
            {"huggingface": "[" * 100_000}
        ),
        "metadata are not as datasets writes them",
    ),
]


@pytest.mark.parametrize(("table", "said"), ODD_TABLES)
def test_odd_parquet_tables(table: pa.Table, said: str, tmp_path: Path) -> None:
    for name in ("train-0.parquet", "validation-0.parquet"):
        pq.write_table(table, tmp_path / name)
    with pytest.raises(UserError, match=said) as caught:
        Parquet(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["struct", "plain", "large"])
def test_images_that_are_null(kind: str, src: Path, tmp_path: Path) -> None:
    """They are set aside, and the others come out as they are, in a struct or plain."""
    types = {"struct": BYTES, "plain": pa.binary(), "large": pa.large_binary()}
    images: list = [(src / "ant" / f"{i:02d}.png").read_bytes() for i in (0, 2)]
    images = [{"bytes": image} for image in images] if kind == "struct" else images
    table = pa.table({"image": pa.array([*images, None], types[kind]), "label": [0, 1, 1]})
    (tmp_path / "tables").mkdir()
    for name in ("train-0.parquet", "validation-0.parquet"):
        pq.write_table(table, tmp_path / "tables" / name)
    main(["imagenet", f"{tmp_path}/tables", f"{tmp_path}/out", "--size", "8", "--workers", "1"])
    assert reasons(tmp_path / "out") == {
        f"{split}/{name}-0.parquet/0/2": "not there"
        for split, name in (("train", "train"), ("val", "validation"))
    }
    assert pq.read_table(tmp_path / "out/mds/manifest.parquet").num_rows == 4


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.apng", "a.pnm", "a.avif"])
def test_a_format_goes_by_all_its_names(name: str, src: Path) -> None:
    shutil.copy(src / "ant" / "00.png", src / "ant" / name)
    names = {item.name for item in Folder(src).items()}
    assert f"ant/{name}" in names


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_split_by_any_name(name: str, src: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    src.rename(tmp_path / "set" / "train")
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / name)
    source = open_source(tmp_path / "set", layout="folder", val_fraction=0.1, seed=0)
    assert source.classes == ["ant", "bee"]
    splits = [(item.split, item.name.split("/")[0]) for item in source.items()]
    assert splits == [("train", "train")] * 12 + [("val", name)] * 12
