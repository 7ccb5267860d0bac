"""Sets in an object store are read there, over HTTP, and give what they give from a disk."""

import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import boto3
import layouts
import numpy as np
import pytest
from layouts import TRAIN, VAL, WNIDS

from data_prep.__main__ import main
from data_prep.sources.storage import ObjectPath, open_file
from tarflow_dist.errors import UserError


def write_npz(root: Path, save: object = np.savez) -> None:
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train_data_batch_1", 9), ("val_data", 4)):
        data = rng.integers(0, 256, (count, 192), dtype=np.uint8)
        save(root / name, data=data, labels=np.arange(count) % 3 + 1)  # type: ignore[operator]


def write_edm(root: Path) -> None:
    root.mkdir(parents=True)
    files = [(wnid, name) for wnid in WNIDS for name in TRAIN[wnid]]
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        labels = [[f"{wnid}/{name}", WNIDS.index(wnid)] for wnid, name in files]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
        for wnid, name in files:
            archive.writestr(f"{wnid}/{name}", TRAIN[wnid][name])


def write_mds(root: Path, compression: str | None = None) -> None:
    from streaming import MDSWriter

    columns = {"x": "bytes", "y": "int"}
    files = {
        "train": [(wnid, data) for wnid in WNIDS for data in TRAIN[wnid].values()],
        "val": list(VAL.values()),
    }
    for split, samples in files.items():
        out = str(root / split)
        with MDSWriter(out=out, columns=columns, compression=compression) as writer:
            for wnid, data in samples:
                writer.write({"x": data, "y": WNIDS.index(wnid)})


def write_pictures(root: Path) -> None:
    """Without classes; two are images by their content alone, and one is no image."""
    (root / ".hidden").mkdir(parents=True)
    for name, (_, content) in VAL.items():
        (root / name).write_bytes(content)
    (root / "without").write_bytes(VAL["ILSVRC2012_val_00000007.JPEG"][1])
    (root / "other.dat").write_bytes(VAL["ILSVRC2012_val_00000001.JPEG"][1])
    (root / "notes.txt").write_bytes(b"")
    (root / ".hidden" / "x.png").write_bytes(b"")


WRITERS = {
    **{name: layouts.WRITERS[name] for name in layouts.LAYOUTS if name != "arrow"},
    "npz": write_npz,
    "npz-compressed": lambda root: write_npz(root, np.savez_compressed),
    "edm": write_edm,
    "mds": write_mds,
    "mds-compressed": lambda root: write_mds(root, "zstd"),
    "pictures": write_pictures,
}


def put(root: Path, prefix: str) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.put_object(Bucket="bucket", Key=f"{prefix}/", Body=b"")  # as consoles make folders
    for file in root.rglob("*"):
        if file.is_file():
            key = f"{prefix}/{file.relative_to(root).as_posix()}"
            client.put_object(Bucket="bucket", Key=key, Body=file.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "timing.json"
    }


@pytest.mark.parametrize("layout", WRITERS)
def test_the_set_is_that_of_the_folder(layout: str, s3: object, tmp_path: Path) -> None:
    src = tmp_path / "here" / layout
    WRITERS[layout](src)
    put(src, f"in/{layout}")
    options = ["--size", "16", "--max-passed-over", "1", "--workers"]
    main(["imagenet", str(src), str(tmp_path / "near"), *options, "1"])
    workers = "2" if layout == "folder" else "1"
    main(["imagenet", f"s3://bucket/in/{layout}/", str(tmp_path / "far"), *options, workers])
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_a_zip_alone(s3: object, tmp_path: Path) -> None:
    write_edm(tmp_path / "zip")
    put(tmp_path / "zip", "zip")
    for src, out in ((tmp_path / "zip/set.zip", "near"), ("s3://bucket/zip/set.zip", "far")):
        main(["imagenet", str(src), str(tmp_path / out), "--size", "8", "--workers", "1"])
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_an_image_is_got_once_and_some_again_for_their_size(s3: object, tmp_path: Path) -> None:
    layouts.write_folder(tmp_path / "src")
    put(tmp_path / "src", "once")
    main(["folder", "s3://bucket/once", str(tmp_path / "out"), "--size", "16", "--workers", "1"])
    got = Counter(s3.downloads("/bucket/once/"))
    assert len(got) == sum(map(len, TRAIN.values())) + len(VAL)
    assert sorted(got.values())[-17:-15] == [1, 2]  # sixteen tell how large an image will be


def test_a_path_in_a_store_is_a_path(s3: object, tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    content = np.random.default_rng(0).bytes(5 << 20)
    (tmp_path / "src" / "a" / "x.bin").write_bytes(content)
    put(tmp_path / "src", "path")
    root = ObjectPath("s3://bucket/path")
    file = root / "a" / "x.bin"
    assert str(file) == "s3://bucket/path/a/x.bin"
    assert str(file.relative_to(root)) == "a/x.bin"
    assert (file.name, file.suffix, file.parent.parent) == ("x.bin", ".bin", root)
    assert list(root.glob("*/*.bin")) == [file]
    assert (root.is_dir(), root.is_file(), file.is_dir(), file.is_file()) == (1, 0, 0, 1)
    assert file.stat().st_size == len(content)
    with pytest.raises(TypeError):
        os.stat(file)
    with open_file(file) as stream:
        for offset in (0, 100, 5_000_000, 4 << 20, 7):
            stream.seek(offset)
            assert stream.read(300) == content[offset : offset + 300]
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == content[-5:]
        assert stream.read() == b""


def test_user_errors_are_one_sentence(
    s3: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts.write_arrow(tmp_path / "arrow")
    put(tmp_path / "arrow", "arrow")

    def refused(src: str) -> str:
        with pytest.raises(UserError) as caught:
            main(["imagenet", src, str(tmp_path / "out"), "--size", "8", "--workers", "1"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("gs://bucket/x").startswith("can't read from gs://bucket/x: give a folder, or")
    assert refused("s3://bucket/nothing").startswith("there is no folder s3://bucket/nothing: give")
    assert refused("s3://no-bucket/x").startswith("can't read s3://no-bucket/x: ")
    assert refused("s3://").startswith("s3: names no bucket: give an address s3://BUCKET/")
    assert refused("s3://bucket/arrow").startswith("can't read s3://bucket/arrow: folders of save")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect to the endpoint" in refused("s3://bucket/elsewhere")


def test_a_store_that_fails_ends_the_run_which_goes_on(
    s3: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.sources.storage.WAITS", (0, 0, 0))
    src = tmp_path / "here" / "fail"
    layouts.write_folder(src)
    put(src, "fail")
    fetch, asked = ObjectPath.fetch, []

    def failing(self: ObjectPath, *part: int) -> bytes:
        asked.append(self)
        if len(asked) in (3, 4) or len(asked) > 20:  # for a moment, then for good
            raise PermissionError(13, "the line is dead", str(self))
        return fetch(self, *part)

    monkeypatch.setattr(ObjectPath, "fetch", failing)
    command = ["imagenet", "s3://bucket/fail", str(tmp_path / "far"), "--size", "16"]
    with pytest.raises(UserError, match=r"can't read s3://bucket/fail/\S+ \(the line is dead\)"):
        main([*command, "--workers", "1"])
    monkeypatch.setattr(ObjectPath, "fetch", fetch)
    main([*command, "--workers", "1"])
    main(["imagenet", str(src), str(tmp_path / "near"), *command[3:], "--workers", "1"])
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
