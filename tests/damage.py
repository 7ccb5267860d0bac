"""Damages shards as disks and copies do."""

import random
from pathlib import Path

KINDS = ("cut", "flipped", "emptied", "swapped")


def damage_shards(folder: Path, *, count: int, seed: int, split: str = "train") -> dict[str, str]:
    """Damages `count` shards of a split, drawn at random, in turn in each way. Returns their names
    in the set, and what was done to each. A single one is cut."""
    rng = random.Random(seed)
    files = [file for file in sorted((folder / split).iterdir()) if file.suffix in (".mds", ".tar")]
    chosen = rng.sample(files, count)
    swapped = chosen[3::4] if count > 7 else []
    done = {}
    for number, file in enumerate(chosen):
        kind = KINDS[number % 4]
        data = bytearray(file.read_bytes())
        if kind == "cut":
            data = data[: rng.randrange(1, len(data) // 8)]
        elif kind == "flipped":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "emptied":
            data = data[:0]
        if kind != "swapped":
            file.write_bytes(data)
        done[f"{split}/{file.name}"] = kind
    contents = [file.read_bytes() for file in swapped]
    for file, content in zip(swapped, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    return done
