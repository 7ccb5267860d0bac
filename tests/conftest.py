"""What several rooms' tests need."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import run
from ranks import free_port

# a job in the background starts with Ctrl-C ignored, and so would the commands under test
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """The tests mean the CPU, those of `-m cuda` apart, and so do the commands they start."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: a thread each
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that none is left for the end."""
    long = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A test's changes end with it: a command run in this process sets its rank, for one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as `python -m data_prep digits` writes them: a folder with mds/ and wds/."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    run("data_prep", "digits", out)
    return out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may make a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@dataclass(frozen=True)
class ObjectStore:
    """An S3-compatible server on loopback, with one bucket, s3://bucket."""

    log: Path
    """A line a request."""

    def downloads(self, part: str) -> list[str]:
        """The objects got so far whose names contain `part`, once for each time."""
        requests = [line.split('"')[1] for line in self.log.read_text().splitlines() if '"' in line]
        got = [request.split()[1] for request in requests if request.startswith("GET ")]
        return [name for name in got if part in name]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    import boto3

    log = tmp_path_factory.mktemp("s3") / "log"
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        pytest.MonkeyPatch.context() as patch,
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as server,
    ):
        try:
            patch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "any")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for _ in range(300):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.1)
            client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
            client.create_bucket(Bucket="bucket")
            yield ObjectStore(log)
        finally:
            server.kill()
