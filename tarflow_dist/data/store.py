"""Where the files of a set lie: in a folder, or in an object store behind a bounded local cache."""

import fcntl
import os
import tempfile
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from tarflow_dist.errors import REFUSED_BY_MACHINE, UserError
from tarflow_dist.files import inside, open_regular

# of this user: another one's could not be written to, or might be fed by them
DEFAULT_CACHE = Path(tempfile.gettempdir()) / f"tarflow_dist-shards-{os.getuid()}"
DEFAULT_CACHE_LIMIT = 100_000_000_000
SHARD_SUFFIXES = (".mds", ".tar")  # what makes room; manifests and the like stay


class Folder:
    """The files of a set, by their names in it, on a disk that this machine sees. Holds no open
    files or connections, nor does `ObjectStore`, so that they can be copied to other processes.

    Attributes:
        limit: bytes that are kept of it; None where files are read as they lie.
    """

    limit: int | None = None

    def __init__(self, root: Path):
        self._root = root

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Fewer than `size` bytes if the file ends before."""
        with self._open(name) as file:
            return os.pread(file.fileno(), size, offset)

    def path(self, name: str) -> Path:
        """A small file that stays, such as the manifest."""
        with self._open(name):
            return self._root / name

    def renew(self, name: str) -> Path | None:
        """Gives up a copy that turned out to be damaged, so that the next `read` fetches the file
        again, and returns its place; None where files are read as they lie."""
        return None

    def _open(self, name: str) -> IO[bytes]:
        return open(open_regular(inside(self._root, name)), "rb", buffering=0)


class ObjectStore(Folder):
    """Files of an object store, downloaded by streaming when they are first read, and kept.

    All processes of a machine share the cache. A file takes its name there when it is whole, and is
    downloaded by one process while the others that want it wait. When the files are over `limit`,
    the longest unused are removed; a reader that has one of them open reads on, since a file's
    content goes when its last reader closes it.

    Args:
        url: of the set's folder, such as s3://bucket/shards/mds.
        cache: a folder on a local disk; may hold several sets, and then bounds them together.
        limit: bytes that `cache` may hold, besides what is being downloaded.

    Raises:
        UserError: there is no set at `url`, it can't be reached, or `cache` not be written to.
    """

    limit: int

    def __init__(self, url: str, *, cache: Path, limit: int):
        self._url, self._cache, self.limit = url, cache, limit
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache {cache} is no folder, nor can be one ({error.strerror}): name another "
                "with data.cache"
            ) from error
        if cache == DEFAULT_CACHE and cache.stat().st_uid != os.getuid():
            raise UserError(f"the cache {cache} is another user's: name one with data.cache")
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            summary = Path(fresh, "summary.json")
            self._fetch("summary.json", summary)
            # a set that was written anew under the same address is another set
            key = blake2b(url.encode() + b"\0" + summary.read_bytes(), digest_size=16).hexdigest()
        super().__init__(cache / key)

    def renew(self, name: str) -> Path:
        local = inside(self._root, name)
        local.unlink(missing_ok=True)
        return local

    def _open(self, name: str) -> IO[bytes]:
        try:
            file = super()._open(name)
        except FileNotFoundError:
            file = self._download(name, self._root / name)
        os.utime(file.fileno())
        return file

    def _download(self, name: str, local: Path) -> IO[bytes]:
        """Brings a file into the cache and returns it opened, before anyone can remove it."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{local}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if local.exists():  # another process brought it while this one waited
                return local.open("rb", buffering=0)
            for left_over in local.parent.glob(f"{local.name}.part*"):  # by a killed process
                left_over.unlink()
            part = local.with_name(f"{local.name}.part")
            self._fetch(name, part)
            self._make_room()
            file = part.open("rb", buffering=0)
            os.replace(part, local)
            return file

    def _fetch(self, name: str, local: Path) -> None:
        url = f"{self._url}/{name}"
        try:
            _downloader(self._url, os.getpid()).download(url, str(local))
        except Exception as error:  # each kind of store has its own errors
            if isinstance(error, OSError) and error.errno in REFUSED_BY_MACHINE:
                raise UserError(
                    f"can't keep {url} in {self._cache} ({error.strerror}): make room there, or "
                    "name another folder with data.cache"
                ) from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"can't read {url} ({reason}): check the address, the credentials and, for a store "
                "that is not Amazon's, S3_ENDPOINT_URL"
            ) from error

    def _make_room(self) -> None:
        """Removes the longest unused shards until the cache is within its limit."""
        found = []
        for file in self._cache.rglob("*.*"):
            with suppress(FileNotFoundError):  # another process makes room as well
                found.append((file.stat(), file))
        total = sum(stat.st_size for stat, _ in found)
        for stat, file in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            if total <= self.limit:
                break
            if file.suffix in SHARD_SUFFIXES:
                file.unlink(missing_ok=True)
                total -= stat.st_size


@cache
def _downloader(url: str, process: int) -> Any:
    """One for each process: a client's connections can't be shared with a forked worker."""
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(url)


def open_store(
    path: str | Path, *, cache: Path | None = None, cache_limit: int | None = None
) -> Folder:
    """`path` is a folder, or the address of one in an object store (scheme://…)."""
    if "://" not in str(path):
        return Folder(Path(path))
    return ObjectStore(
        str(path).rstrip("/"),
        cache=cache or DEFAULT_CACHE,
        limit=cache_limit or DEFAULT_CACHE_LIMIT,
    )
