"""Files and folders that become visible whole or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar

import xxhash

from tarflow_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")
UMASK = os.umask(0o022)  # can only be read by setting it
os.umask(UMASK)
LONGEST_NAME = 255  # bytes, on all file systems that matter
SEAL = "xxh3_128"  # of a file, and the name that it goes by in JSON
LARGEST_JSON = 2**26  # bytes: a summary of a hundred thousand classes has a tenth of it


@contextmanager
def write_whole(file: Path, part: Path | None = None) -> Iterator[Path]:
    """Yields a path to write to, `part` or one beside `file`; when the body ends well, it is synced
    to disk and takes the name of `file`. If the body raises, `file` is as it was before."""
    part = part or file.with_name(f".{file.name}.part")
    try:
        yield part
        sync(part)
        os.replace(part, file)
        sync(file.parent)
    except OSError as error:  # from a stream, it doesn't say where
        error.filename = error.filename or str(file)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_tensors(
    file: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:  # of a full disk, too
        raise OSError(errno.EIO, str(error)) from error
    file.chmod(0o666 & ~UMASK)  # safetensors writes for its owner alone


def publish_folder(part: Path, folder: Path) -> None:
    """Syncs the finished folder `part` to disk and gives it the name `folder`, replacing what may
    stand there."""
    for root, _, names in os.walk(part):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(part, folder)
    sync(folder.parent)


def inside(folder: Path, name: object) -> Path:
    """The path of `name` in `folder`, where `name` stands in a file, which may be damaged or a
    stranger's.

    Raises:
        ValueError: it is no name, or leads out of `folder`.
    """
    path = PurePosixPath(name) if isinstance(name, str) and "\0" not in name else None
    if path is None or not path.parts:
        raise ValueError(f"{str(name)[:100]!r} is no file name")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{str(name)[:100]!r} leads out of its folder")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise ValueError(f"{str(name)[:100]!r} is too long for a file name")
    return folder / path


class NotRegularError(OSError):
    """A pipe, a device or a folder, which could be read for ever."""


def open_regular(file: Path) -> int:
    """A descriptor of `file`.

    Raises:
        NotRegularError: it is no regular file.
        OSError: it is not there, or can't be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularError(errno.EINVAL, "it is not a regular file", str(file))
    return descriptor


def regular(file: Path) -> Path:
    """`file`, for libraries that open it by its name. Errors as `open_regular`."""
    os.close(open_regular(file))
    return file


def read_regular(file: Path) -> bytes:
    """All of a file. Errors as `open_regular`."""
    with open(open_regular(file), "rb") as stream:
        return stream.read()


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it is not there, or no regular file.
        ValueError: it is damaged, nested without end, or larger than any file of ours.
    """
    with open(open_regular(file), "rb") as stream:
        data = stream.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON} bytes")
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_sealed(file: Path, content: dict[str, Any], *, version: int) -> None:
    """Writes a JSON object, whole, with the `version` of its format and a hash of what it says."""
    sealed = {"version": version, **content}
    with write_whole(file) as part:
        part.write_text(json.dumps({**sealed, SEAL: _hash(sealed)}, indent=2) + "\n")


def read_sealed(file: Path, *, version: int) -> dict[str, Any]:
    """What `write_sealed` wrote. Without a hash, as before there was one, or where a person took it
    out after a change, a file is taken as it is.

    Args:
        version: the newest that is known here.

    Raises:
        OSError: it is not there, or no regular file.
        ValueError: it is damaged, was changed, or is of a later version.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError("it is not what was written there")
    if SEAL in content and content.pop(SEAL) != _hash(content):
        raise ValueError(
            f"it is damaged or was changed: if the change is meant, take its {SEAL} out"
        )
    try:
        take_version(content, newest=version)
    except ValueError as error:
        raise ValueError(f"its format is {error}") from error
    return content


def take_version(content: dict[str, Any], *, newest: int) -> None:
    """Takes the version of its format out of what a file says; without one it is the first.

    Raises:
        ValueError: it is later than `newest`, or none; says so from "version" on.
    """
    there = content.pop("version", 1)
    if there != newest and not (isinstance(there, int) and 0 < there < newest):
        raise ValueError(
            f"version {there}, and this tarflow_dist knows up to {newest}: use a later one"
        )


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def from_saved(kind: type[T], saved: Mapping[str, Any]) -> T:
    """The dataclass `kind` from what a file of any version says of it: what is absent has its
    default, and what is no longer known is left out if it was empty.

    Raises:
        ValueError: something unknown is not empty, something is missing, or no value of `kind`'s.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{saved!r:.100} is no {kind.__name__}")
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    used = {name: value for name, value in saved.items() if name in names or value}
    if unknown := sorted(used.keys() - names):
        raise ValueError(f"this version of tarflow_dist does not know its {unknown[0]}")
    try:
        return kind(**used)
    except TypeError as error:
        raise ValueError(str(error).rpartition("() ")[2]) from error


def describe(file: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with open(open_regular(file), "rb") as stream:
        digest = hashlib.file_digest(stream, xxhash.xxh3_128)  # type: ignore[arg-type]
    return {"bytes": file.stat().st_size, SEAL: digest.hexdigest()}


def sha256(*files: Path) -> str:
    """The digest of the files' bytes one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until the file or folder `path` is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_up_pages(file: Path) -> None:
    """Takes a file that is on disk and will not be read soon out of the system's memory, so that
    it pushes nothing else out of it, and what is written next need not look for room."""
    if hasattr(os, "posix_fadvise"):  # Linux
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_npy_header(stream: IO[bytes]) -> "tuple[tuple[int, ...], bool, np.dtype]":
    """Shape, whether it is in Fortran's order, and type of the array that `stream`, a .npy, holds
    from here on.

    Raises:
        ValueError: it is no .npy.
    """
    from numpy.lib import format

    readers = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}
    version = format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"its .npy version {version} is unknown")
    return readers[version](stream)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder` until the body ends, or this process does.

    Raises:
        UserError: another run is in there.
    """
    file = folder / ".lock"
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_at(descriptor, file):  # not one that its owner has just removed
                break
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing to {folder}: wait for it, or choose another folder"
            ) from error
        os.close(descriptor)
    try:
        yield
    finally:
        if _is_open_at(descriptor, file):  # nobody has removed it, or put another there
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_open_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
