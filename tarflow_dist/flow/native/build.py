"""Compiles transformer.cpp for the CPU at hand, once a machine: about a second."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("transformer.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
THREADS = ("-fopenmp",) if sys.platform == "linux" else ()
"""Elsewhere compilers come without OpenMP, and the kernel runs in one thread."""
MOST_SAID = 4000
"""Characters of a compiler's message that are shown."""
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By `torch.backends.cpu.get_cpu_capability`; elsewhere it is the compiler's choice."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, after a warning, where it can't be made."""
    flags = (*FLAGS, *THREADS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    key = repr((flags, platform.machine(), platform.libc_ver())).encode() + SOURCE.read_bytes()
    name = f"transformer-{hashlib.blake2b(key, digest_size=10).hexdigest()}.so"
    try:
        folder = _own_cache()
        if folder is not None and (folder / name).exists():
            with suppress(OSError, AttributeError):  # it is damaged, and made anew
                return _open(folder / name)
        # whole or not at all, whoever else compiles it meanwhile
        with tempfile.TemporaryDirectory(dir=folder) as work:
            file = _compile(flags, Path(work) / name)
            found = _open(file)
            if folder is not None:
                file.replace(folder / name)
        return found
    except (OSError, RuntimeError, AttributeError, subprocess.CalledProcessError) as error:
        reason = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"{shlex.join(error.cmd)} ended with {error.returncode}"
            if said := error.stderr.strip()[:MOST_SAID]:
                reason += f":\n{said}\n"
        warnings.warn(
            f"torch's own operations sample on this CPU, several times slower than the kernel, "
            f"which can't be compiled: {reason}",
            stacklevel=2,
        )
        return None


def _compile(flags: tuple[str, ...], file: Path) -> Path:
    named = os.environ.get("CXX", "").strip() or "c++"
    try:
        compiler = shlex.split(named)
    except ValueError as error:
        raise RuntimeError(f"CXX is {named}: {error}") from error
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"there is no C++ compiler {compiler[0]}")
    command = [*compiler, *flags, str(SOURCE), "-o", str(file)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return file


def _open(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    found.keys_size.argtypes = found.values_size.argtypes = [pointer]
    found.packed_size.argtypes = [number, number]
    for size in (found.keys_size, found.values_size, found.packed_size):
        size.restype = ctypes.c_int64
    found.pack.argtypes = [pointer, number, number, pointer, number]
    found.extend.argtypes = [pointer, pointer, pointer, pointer, number]
    found.pack.restype = found.extend.restype = None
    return found


def _own_cache() -> Path | None:
    """A folder that nobody else writes to, because what lies there is run; None without one."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tarflow_dist"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # also: a user without a home
        return None
    own = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None
