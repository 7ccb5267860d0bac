"""Compiles layers.cpp for the CPU at hand, once a machine: half a second."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("layers.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By `torch.backends.cpu.get_cpu_capability`; elsewhere it is the compiler's choice."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, after a warning, where there is no compiler that can make it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        _warn("no C++ compiler was found ($CXX, or c++)")
        return None
    flags = (*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    key = hashlib.blake2b(repr((compiler, flags)).encode() + SOURCE.read_bytes(), digest_size=10)
    file = _cache_folder() / f"layers-{key.hexdigest()}.so"
    if not file.exists():
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        command = [compiler, *flags, str(SOURCE), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["without a word"])[0]
            _warn(f"{compiler} can't compile {SOURCE.name} ({reason})")
            return None
        part.replace(file)  # whole or not at all, whoever else compiles it meanwhile
    found = ctypes.CDLL(str(file))
    for size in (found.keys_size, found.values_size, found.packed_size):
        size.restype = ctypes.c_int64
    return found


def _warn(what: str) -> None:
    warnings.warn(f"{what}: this CPU samples several times slower without", stacklevel=3)


def _cache_folder() -> Path:
    """The user's own: what lies there is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tarflow_dist"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tarflow_dist-"))
