"""`python -m data_prep … s3://…`, over HTTP, and training from there."""

import json
import os
import tempfile
import time
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import boto3
import pytest
from commands import FRESH
from streaming.base.storage.upload import S3Uploader

from data_prep.__main__ import main
from data_prep.settings import Settings
from data_prep.sources import Digits
from data_prep.upload import LAST, prepare_and_upload, staging_folder
from tarflow_dist.errors import UserError


def objects(prefix: str) -> dict[str, bytes]:
    """Names below `prefix` and contents."""
    client = store()
    return {
        name: client.get_object(Bucket="bucket", Key=f"{prefix}/{name}")["Body"].read()
        for name in names(client, prefix)
    }


def store() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])


def names(client: Any, prefix: str) -> list[str]:
    """Of the objects below `prefix`."""
    listed = client.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("Contents", [])
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in listed]


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def but_for_times(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.endswith("timing.json")}


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    get_temp_dir()  # the system's, since the name of a process's socket must be short
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_the_store_gets_what_a_folder_would(
    s3: object, digits: Path, staging: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["digits", "s3://bucket/up/"])
    assert capsys.readouterr().out.splitlines() == [
        f"s3://bucket/up/{form}: 1500 train and 297 val images, 10 classes, 8x8x1 png"
        for form in ("mds", "wds")
    ]
    assert but_for_times(objects("up")) == but_for_times(contents(digits))
    assert not list(staging.glob("data_prep-*"))
    said = "^s3://bucket/up/mds already holds a set: remove it or choose another$"
    with pytest.raises(UserError, match=said):
        main(["digits", "s3://bucket/up"])


def test_user_errors_come_before_the_work(s3: object, staging: Path) -> None:
    for out in ("s3://no-bucket/x", "what://is/this"):
        with pytest.raises(UserError, match=rf"^can't write to {out}/mds \(") as caught:
            main(["digits", out])
        assert "\n" not in str(caught.value)
    assert not list(staging.glob("data_prep-*"))


def run_apart(arguments: list[str], tmp: str, env: dict[str, str]) -> None:
    """With time for a kill between two files."""
    os.environ |= env
    tempfile.tempdir = tmp
    upload = S3Uploader.upload_file

    def slowly(self: S3Uploader, name: str) -> None:
        time.sleep(0.2)
        upload(self, name)

    S3Uploader.upload_file = slowly
    main(arguments)


def test_killed_while_it_uploads_it_goes_on(s3: object, digits: Path, staging: Path) -> None:
    command = ["digits", "s3://bucket/kill", "--format", "mds"]
    env = {name: os.environ[name] for name in os.environ if name.startswith(("AWS", "S3"))}
    client = store()  # once: it takes as long as an upload
    for uploaded in (0, 1, 3, 5):
        process = FRESH.Process(target=run_apart, args=(command, str(staging), env))
        process.start()
        while len(names(client, "kill/mds")) < uploaded or not any(staging.glob("data_prep-*")):
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert LAST not in names(client, "kill/mds")
    main(command)
    assert but_for_times(objects("kill/mds")) == but_for_times(contents(digits / "mds"))


def test_the_summary_comes_last(s3: object, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = []
    original = S3Uploader.upload_file

    def failing(self: S3Uploader, name: str) -> None:
        if len(uploaded) == 3:
            uploaded.append("broken")
            raise OSError("the line is dead")
        original(self, name)
        uploaded.append(name)

    monkeypatch.setattr(S3Uploader, "upload_file", failing)
    monkeypatch.setattr("tempfile.tempdir", str(staging))
    arguments = (Digits(seed=0), "s3://bucket/last", ["wds"], Settings(size=8))
    with pytest.raises(ValueError, match=r"can't write to s3://bucket/last/wds/\S+ \(the line"):
        prepare_and_upload(*arguments, workers=1)
    assert len(objects("last/wds")) == 3
    summary = prepare_and_upload(*arguments, workers=1)
    assert uploaded[-1] == LAST
    assert len(set(uploaded)) == len(uploaded)  # nothing twice
    assert json.loads(objects("last/wds")[LAST]) == summary
    assert not list(staging.glob("data_prep-*"))


def test_a_damaged_summary_of_what_waits_is_one_sentence(staging: Path) -> None:
    source, settings = Digits(seed=0), Settings(size=8)
    done = staging_folder(source, "s3://bucket/up", ["mds"], settings) / "summary.json"
    done.parent.mkdir()
    done.write_text("{")
    with pytest.raises(UserError, match=rf"^{done} is damaged \(.*\): remove {done.parent} to"):
        prepare_and_upload(source, "s3://bucket/up", ["mds"], settings, workers=1)
