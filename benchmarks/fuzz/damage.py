"""What disks, copies and strangers do to a file: each kind changes it in place, from a seed."""

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STRANGE = (None, True, -1, 0, 2**31, 10**30, 1e300, float("nan"), "", "32", "ü\0", [], {}, [[]])
CLIMBING = ("../../../climbed", "/tmp/climbed", "..", "train/../../../../climbed", "x" * 5000)
TEXT_LENGTH = 200_000


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def cut(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


def lose_block(file: Path, draw: random.Random) -> None:
    """As a disk without power: a stretch of zeros."""
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    file.write_bytes(data)


def empty(file: Path, draw: random.Random) -> None:
    file.write_bytes(b"")


def replace(file: Path, draw: random.Random) -> None:
    file.write_bytes(draw.choice([draw.randbytes(300), b"<html>404 Not Found</html>\n" * 100]))


def nest(file: Path, draw: random.Random) -> None:
    """Brackets without end."""
    file.write_text(draw.choice(["[", '{"a":', "- " * 3, "["]) * (TEXT_LENGTH // 6))


def grow(file: Path, draw: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(draw.choice([draw.randbytes(100), bytes(4096), b"\n" * 10, b"}" * 5]))


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


def no_file(file: Path, draw: random.Random) -> None:
    """Something else of its name, which hangs or never ends when read."""
    file.unlink()
    draw.choice([os.mkfifo, os.mkdir, lambda f: os.symlink("/dev/zero", f)])(file)


def retype(file: Path, draw: random.Random) -> None:
    """One value becomes one of another kind or size."""
    _change(file, draw, STRANGE)


def climb(file: Path, draw: random.Random) -> None:
    """One value becomes a path that leads out of the folder."""
    _change(file, draw, CLIMBING)


KINDS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip, flip, flip, cut, lose_block, empty, replace, nest, grow, remove, no_file),
    *(retype, retype, climb),
)


def _change(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    change = _EDITORS.get(file.suffix, _change_text)
    change(file, draw, values)


def _change_json(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    """Of a file with one document, or one a line."""
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    number = draw.randrange(len(lines))
    lines[number] = json.dumps(_with_strange(json.loads(lines[number]), draw, values))
    file.write_text("\n".join(lines) + "\n")


def _change_yaml(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    import yaml

    file.write_text(yaml.safe_dump(_with_strange(yaml.safe_load(file.read_text()), draw, values)))


def _with_strange(document: Any, draw: random.Random, values: tuple[Any, ...]) -> Any:
    """`document` with one of its values, at any depth, exchanged, lost or given a strange name."""
    places = list(_places(document))
    if not places:
        return draw.choice(values)
    parent, key = draw.choice(places)
    what = draw.randrange(10)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[str(draw.choice(values))] = parent.pop(key)
    else:
        parent[key] = draw.choice(values)
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    if isinstance(document, dict):
        pairs = list(document.items())
    elif isinstance(document, list):
        pairs = list(enumerate(document))
    else:
        return []
    return [(document, key) for key, _ in pairs] + [p for _, v in pairs for p in _places(v)]


def _change_safetensors(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    """One value of its header."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(_with_strange(json.loads(data[8:end]), draw, values)).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def _change_parquet(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    """One column, cell or line of metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    name = draw.choice(table.column_names)
    rows = table.to_pydict()
    what = draw.randrange(5)
    if what == 0 or not len(table):
        del rows[name]
    elif what == 1:
        rows[name] = [draw.choice(values)] * len(table)
    else:
        rows[name][draw.randrange(len(table))] = draw.choice(values)
    try:
        changed = pa.table(rows, metadata=table.schema.metadata if what < 4 else None)
        pq.write_table(changed, file)
    except (pa.ArrowException, OverflowError, ValueError, TypeError, AttributeError):
        pq.write_table(table.drop_columns([name]), file)  # no column has values of both kinds


def _change_npz(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    """One array, or its header alone."""
    with np.load(file) as arrays:
        found = dict(arrays)
    name = draw.choice(sorted(found))
    array = found[name]
    what = draw.randrange(9)
    if what == 8:
        _claim_much(file, name)
        return
    found[name] = (
        array[:0] if array.ndim else np.empty(0),
        np.array(draw.choice(["text", 0, 1e300])),
        array.astype(complex) if array.dtype.kind in "fiu" else np.zeros(3, complex),
        np.full(array.shape, np.nan),
        np.full(array.shape, np.inf),
        array[None],
        np.full(array.shape, 1e200),
        array.reshape(-1)[: max(1, array.size // 2)],
    )[what]
    np.savez(file.with_suffix(".npz"), **found)


def _claim_much(file: Path, name: str) -> None:
    """An array of 10¹² rows, of which nothing follows."""
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 64)}
    )
    with zipfile.ZipFile(file) as old:
        members = {n: old.read(n) for n in old.namelist()}
    members[f"{name}.npy"] = header.getvalue()
    with zipfile.ZipFile(file, "w") as new:
        for member, data in members.items():
            new.writestr(member, data)


def _change_pth(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    """One tensor or its name."""
    import torch

    weights = torch.load(file, weights_only=True)
    name = draw.choice(sorted(weights))
    tensor = weights[name]
    changes: list[Callable[[], Any]] = [
        lambda: tensor[:0] if tensor.ndim else tensor[None],
        lambda: tensor * float("nan"),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: tensor.to_sparse() if tensor.ndim else tensor,
        lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.long(),
        lambda: draw.choice(values),
    ]
    what = draw.randrange(len(changes) + 2)
    if what < len(changes):
        weights[name] = changes[what]()
    elif what == len(changes):
        del weights[name]
    else:
        number = next((part for part in name.split(".") if part.isdigit()), "0")
        weights[name.replace(f".{number}.", ".999999999.", 1)] = weights.pop(name)
    torch.save(weights, file)


def _change_text(file: Path, draw: random.Random, values: tuple[Any, ...]) -> None:
    """One word of a text, or a stretch of any other file."""
    data = file.read_bytes()
    word = str(draw.choice(values)).encode()
    start = draw.randrange(max(1, len(data)))
    end = start + draw.randrange(1, 12)
    file.write_bytes(data[:start] + word + data[end:])


_EDITORS: dict[str, Callable[[Path, random.Random, tuple[Any, ...]], None]] = {
    ".json": _change_json,
    ".jsonl": _change_json,
    ".yaml": _change_yaml,
    ".safetensors": _change_safetensors,
    ".parquet": _change_parquet,
    ".npz": _change_npz,
    ".pth": _change_pth,
}
