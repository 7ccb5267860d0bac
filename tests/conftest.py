"""What several rooms' tests need: shards of digits, and commands run as a user runs them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as `python -m data_prep digits` writes them: a folder with mds/ and wds/."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    command = [sys.executable, "-m", "data_prep", "digits", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `python -m module arguments…`, under torchrun for more than one rank, one thread each.

    The rank count is given as `ranks`; `check=False` returns a failed command too.
    """

    def run(
        module: str, *arguments: object, ranks: int = 1, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m"]
        done = subprocess.run(
            [*launcher, module, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if check and done.returncode:
            raise AssertionError(f"{module} failed:\n{done.stdout}\n{done.stderr}")
        return done

    return run
