"""`python -m data_prep … s3://…`, over HTTP, and training from there."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
from commands import run

from data_prep.remote import LAST, prepare_and_upload


def objects(prefix: str) -> dict[str, bytes]:
    """Names below `prefix` and contents."""
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    listed = client.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("Contents", [])
    return {
        entry["Key"].removeprefix(f"{prefix}/"): client.get_object(
            Bucket="bucket", Key=entry["Key"]
        )["Body"].read()
        for entry in listed
    }


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def but_for_times(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.endswith("timing.json")}


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_the_store_gets_what_a_folder_would(s3: object, digits: Path, staging: Path) -> None:
    done = run("data_prep", "digits", "s3://bucket/up/")
    assert done.stdout.splitlines() == [
        f"s3://bucket/up/{form}: 1500 train and 297 val images, 10 classes, 8x8x1 png"
        for form in ("mds", "wds")
    ]
    assert but_for_times(objects("up")) == but_for_times(contents(digits))
    assert not list(staging.glob("data_prep-*"))

    done = run("data_prep", "digits", "s3://bucket/up", check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: s3://bucket/up/mds already holds a set: remove it or choose another\n"
    )


def test_user_errors_come_before_the_work(s3: object, staging: Path) -> None:
    for out in ("s3://no-bucket/x", "what://is/this"):
        done = run("data_prep", "digits", out, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: can't write to {out}/mds (")
        assert done.stderr.count("\n") == 1
    assert not list(staging.glob("data_prep-*"))


def test_killed_at_any_moment_it_goes_on(s3: object, digits: Path, staging: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "digits", "s3://bucket/kill", "--format", "mds"]
    rng = random.Random(0)
    for _ in range(4):
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(1, 8))
        started.kill()
        started.communicate()
        if LAST in objects("kill/mds"):
            break
        assert LAST not in objects("kill/mds")
    if LAST not in objects("kill/mds"):
        run("data_prep", "digits", "s3://bucket/kill", "--format", "mds")
    assert but_for_times(objects("kill/mds")) == but_for_times(contents(digits / "mds"))


def test_the_summary_comes_last(s3: object, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming.base.storage.upload import S3Uploader

    from data_prep.records import Settings
    from data_prep.sources import Digits

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
