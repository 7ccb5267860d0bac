"""Files of a source, on a disk or in an object store: read where they lie, patiently, and named
where they are damaged."""

import errno
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PosixPath
from typing import IO, Any, NamedTuple, NoReturn, TypeVar
from zipfile import ZIP_STORED, BadZipFile, ZipInfo

from fsspec.spec import AbstractBufferedFile

from data_prep.sources.names import readable
from tarflow_dist.errors import REFUSED_BY_MACHINE, UserError
from tarflow_dist.files import NotRegularError, open_regular, read_regular

S3 = "s3://"
BUFFER = 1 << 22  # bytes that are fetched ahead where a file is read from the front on
CONNECTIONS = 32
ABSENT = ("404", "NoSuchKey")
WAITS = (0.5, 2.0, 8.0)
"""Seconds before something that the system refused is tried again."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a file in a zip: signature, lengths of its name and of what follows that."""
T = TypeVar("T")


def source_path(address: str) -> Path:
    """A folder or a file on a disk, or in an S3 store.

    Raises:
        UserError: it is in another kind of store.
    """
    if address.startswith(S3):
        return ObjectPath(address)
    if "://" in address:
        raise UserError(f"can't read from {address}: give a folder, or an address s3://BUCKET/…")
    return Path(address)


def open_file(file: Path) -> IO[bytes]:
    """A regular file, to be read from any place in it. Errors as `open_regular`."""
    if isinstance(file, ObjectPath):
        return _Stream(file)
    return open(open_regular(file), "rb")


def read_file(file: Path) -> bytes:
    """All of a regular file. Errors as `open_regular`."""
    return file.fetch() if isinstance(file, ObjectPath) else read_regular(file)


def read_part(file: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a regular file, or fewer if it ends before. Errors as `open_regular`."""
    if isinstance(file, ObjectPath):
        return file.fetch(offset, size)
    with open(open_regular(file), "rb", buffering=0) as stream:
        stream.seek(offset)
        return stream.read(size)


def patiently(read: Callable[[], T], file: Path) -> T:
    """What `read` gives. What the system refuses may be there in a moment: it is tried again after
    each of WAITS.

    Raises:
        NotRegularError: it is no file.
        UserError: it still can't be read.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except NotRegularError:
            raise
        except OSError as error:
            if wait is None:
                raise UserError(
                    f"can't read {readable(str(file))} ({error.strerror}), after "
                    f"{len(WAITS)} more attempts: once it can be read, the same command goes on"
                ) from error
            time.sleep(wait)
    raise AssertionError


@contextmanager
def damage_named(what: str, mend: str = "fetch it again") -> Iterator[None]:
    """Whatever damage makes a parser raise in the body becomes a `UserError`: `what`, why, and how
    to `mend` it. What the system refuses says nothing of the content, and passes."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSED_BY_MACHINE:
            raise
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{what} ({said.splitlines()[0]}): {mend}") from error


def unreadable(error: OSError) -> UserError:
    """What a user is told of a file or folder that the system refuses."""
    return UserError(f"can't read {error.filename}: {error.strerror}")


def zip_part(stream: IO[bytes], member: ZipInfo) -> tuple[int, int]:
    """Offset and size of a file in the zip `stream`, which the zip's index alone doesn't tell.

    Raises:
        ValueError: it is compressed or locked.
        BadZipFile: it isn't there.
    """
    if member.compress_type != ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{member.filename} is compressed or locked: unpack it, give the folder")
    stream.seek(member.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise BadZipFile(f"{member.filename} is not where the index says")
    return member.header_offset + LOCAL_HEADER.size + name + extra, member.file_size


class Listing(NamedTuple):
    """What lies in a folder of a store."""

    folders: list[str]
    files: dict[str, int]
    """Names and sizes."""


class ObjectPath(PosixPath):
    """An object of an S3 store, s3://BUCKET/KEY, or a folder: what lies below s3://BUCKET/KEY/.

    It has a path's methods as far as sources use them. The functions of the system don't take it.
    A folder is listed once in a process.

    Raises (each method that asks the store):
        FileNotFoundError: there is no such object.
        PermissionError: the store can't be reached or refuses, which, as with a disk's, says
            nothing of what is in the files.
    """

    def __str__(self) -> str:
        return re.sub("^s3:/(?=[^/])", S3, super().__str__())

    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} is on no disk")

    @property
    def bucket(self) -> str:
        return self.parts[1]

    @property
    def key(self) -> str:
        return "/".join(self.parts[2:])

    def absolute(self) -> "ObjectPath":
        return self

    def resolve(self, strict: bool = False) -> "ObjectPath":
        return self

    def listing(self) -> Listing:
        return _list(self)

    def is_dir(self, **_: Any) -> bool:
        return any(self.listing())

    def is_file(self, **_: Any) -> bool:
        return bool(self.key) and self.name in self.parent.listing().files

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self, **_: Any) -> os.stat_result:
        if not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        size = self.parent.listing().files[self.name]
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def glob(self, pattern: str, **_: Any) -> Generator["ObjectPath", None, None]:
        first, *rest = pattern.split("/", 1)
        there = self.listing()
        for name in there.folders if rest else there.files:
            if fnmatchcase(name, first):
                yield from (self / name).glob(*rest) if rest else [self / name]

    def fetch(self, offset: int = 0, size: int | None = None) -> bytes:
        """All of the object, or a part of it."""
        if size == 0:
            return b""
        options = {"Bucket": self.bucket, "Key": self.key}
        if size is not None:
            options["Range"] = f"bytes={offset}-{offset + size - 1}"
        return _ask(self, lambda s3: s3.get_object(**options)["Body"].read())


class _Stream(AbstractBufferedFile):
    """An object from any place in it on."""

    def __init__(self, file: ObjectPath):
        super().__init__(None, file, block_size=BUFFER, size=file.stat().st_size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.path.fetch(start, end - start)


def forget_listings() -> None:
    """Folders are listed anew."""
    _list.cache_clear()


@cache
def _list(folder: ObjectPath) -> Listing:
    if len(folder.parts) < 2:
        raise UserError(f"{folder} names no bucket: give an address s3://BUCKET/…")
    prefix = f"{folder.key}/" if folder.key else ""
    options = {"Bucket": folder.bucket, "Prefix": prefix, "Delimiter": "/"}
    pages = _ask(
        folder,
        lambda s3: s3.get_paginator("list_objects_v2").paginate(**options).build_full_result(),
    )
    folders = [entry["Prefix"] for entry in pages.get("CommonPrefixes", ())]
    sizes = {entry["Key"]: entry["Size"] for entry in pages.get("Contents", ())}
    sizes.pop(prefix, None)  # what some programs put where folders are
    found = Listing(
        [name.removeprefix(prefix).removesuffix("/") for name in folders],
        {name.removeprefix(prefix): size for name, size in sizes.items()},
    )
    for name in (*found.folders, *found.files):
        if name in ("", ".", ".."):
            raise UserError(f"{folder}/ has something called {name!r}: no path leads there")
    return found


def _ask(path: ObjectPath, question: Any) -> Any:
    """What `question` gives of the store's client. Errors as ObjectPath."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return question(_client(os.environ.get("S3_ENDPOINT_URL")))
    except (BotoCoreError, ClientError, ValueError) as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
        if code in ABSENT:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path)) from error
        raise PermissionError(errno.EACCES, " ".join(str(error).split()), str(path)) from error


@cache
def _client(endpoint: str | None) -> Any:
    """As streaming makes it for the sets that are written and read: without credentials, a public
    bucket can be read."""
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = Session()
    signature = {} if session.get_credentials() else {"signature_version": UNSIGNED}
    config = Config(retries={"mode": "standard"}, max_pool_connections=CONNECTIONS, **signature)
    return session.client("s3", endpoint_url=endpoint, config=config)
