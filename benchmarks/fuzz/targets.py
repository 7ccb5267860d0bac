"""A small world of all that the product reads, and the commands that read it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

TRAIN = ["configs/digits.yaml", "run=run", "data.path=digits/mds", "log.wandb=disabled"]
TRAIN += ["train.batch_size=64", "optimizer.warmup_images=64", "model.layers_per_block=1"]
TRAIN += ["model.num_blocks=2", "model.width=64", "checkpoint.every_images=64", "checkpoint.keep=9"]
TRAIN += ["log.every_images=64", "preview.every_images=null", "train.images=256"]
SAMPLE_FID = ["--model", "model", "--out", "samples", "--num-samples", "8", "--batch-size", "4"]
SAMPLE_FID += ["--features", "pixels", "--reference"]
PREPARE = ["imagenet", "--size", "8", "--workers", "1", "--max-errors", "1"]


def nothing(world: Path) -> None:
    """Where what comes out depends on what the user gave, damaged or not."""


@dataclass(frozen=True)
class Target:
    """Files of one kind, and what reads them.

    Attributes:
        folders: of the world, copied for each case.
        files: of which one is damaged, as patterns in the world.
        command: a module and its arguments, run in the copy.
        result: what must be the same as with the sound files.
        codes: exit codes of a sentence.
        keeps: files that must be there afterwards: none may be lost besides the damaged one.
    """

    name: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    command: tuple[str, ...]
    result: Callable[[Path], Any] = nothing
    codes: tuple[int, ...] = (2,)
    keeps: tuple[str, ...] = field(default=())


def curve(world: Path) -> Any:
    """The rows of metrics, and the last checkpoint's weights."""
    rows = [json.loads(line) for line in (world / "run/metrics.jsonl").read_text().splitlines()]
    figures = [(row["images"], row["loss"], row["grad_norm"]) for row in rows]
    return figures, _hashes(world, "run/checkpoints/00000000256/*.safetensors")


def figures(world: Path) -> Any:
    found = json.loads((world / "samples/result.json").read_text())
    return [found[name] for name in ("frechet_distance", "samples_sha256", "precision", "recall")]


def files(pattern: str) -> Callable[[Path], Any]:
    return partial(_hashes, pattern=pattern)


def _hashes(world: Path, pattern: str) -> dict[str, str]:
    return {
        file.relative_to(world).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(world.glob(pattern))
    }


SETS = ("digits/mds/**/*", "digits/wds/**/*")
CHECKPOINTS = ("run/checkpoints/*/state.json", "run/checkpoints/*/*.safetensors")
TARGETS = (
    Target(
        "a run's small files",
        ("digits", "run", "configs"),
        ("run/checkpoints/*/state.json", "run/checkpoints/latest", "run/*.json*", "run/*.yaml"),
        ("tarflow_dist.train", *TRAIN),
        curve,
        keeps=CHECKPOINTS,
    ),
    Target(
        "a run's tensors",
        ("digits", "run", "configs"),
        ("run/checkpoints/*/*.safetensors",),
        ("tarflow_dist.train", *TRAIN),
        curve,
        keeps=CHECKPOINTS,
    ),
    Target(
        "a set, trained on",
        ("digits", "run", "configs"),
        ("digits/mds/*", "digits/mds/train/*"),
        ("tarflow_dist.train", *TRAIN),
        curve,
        keeps=CHECKPOINTS,
    ),
    Target(
        "a recipe",
        ("digits", "configs"),
        ("configs/digits.yaml",),
        ("tarflow_dist.plan", "configs/digits.yaml", "--gpu", "h100"),
    ),
    Target(
        "a checkpoint, converted",
        ("run",),
        ("run/checkpoints/00000000192/*",),
        ("tarflow_dist.convert", "run/checkpoints/00000000192", "converted"),
        files("converted/model.safetensors"),
        keeps=CHECKPOINTS,
    ),
    Target(
        "published weights",
        ("published.pth",),
        ("published.pth",),
        ("tarflow_dist.convert", "published.pth", "converted", "--sigma", "0.1"),
        files("converted/model.safetensors"),
    ),
    Target(
        "a model",
        ("model",),
        ("model/*.json", "model/*.safetensors"),
        ("tarflow_dist.sample", "model", "--labels", "1,2", "--guidance", "1"),
        files("samples.png"),
    ),
    Target(
        "a sample store",
        ("model", "samples", "reference.npz"),
        ("samples/*.parquet", "samples/settings.json", "samples/features.npz"),
        ("tarflow_dist.sample_fid", *SAMPLE_FID, "reference.npz"),
        figures,
    ),
    Target(
        "a reference",
        ("model", "samples", "reference.npz"),
        ("reference.npz",),
        ("tarflow_dist.sample_fid", *SAMPLE_FID, "reference.npz"),
        figures,
    ),
    Target(
        "a set, measured",
        ("model", "samples", "digits"),
        ("digits/mds/*", "digits/mds/val/*"),
        ("tarflow_dist.sample_fid", *SAMPLE_FID, "digits/mds", "--split", "val"),
        figures,
    ),
    Target(
        "a set, verified", ("digits",), SETS, ("data_prep", "verify", "digits/mds"), codes=(1, 2)
    ),
    Target(
        "tars, verified", ("digits",), SETS, ("data_prep", "verify", "digits/wds"), codes=(1, 2)
    ),
    Target("a set, shown", ("digits",), SETS, ("data_prep", "show", "digits/mds")),
    Target(
        "an unfinished preparation",
        ("unfinished",),
        ("unfinished/.partial/*", "unfinished/.partial/done/*"),
        ("data_prep", "digits", "unfinished"),
        files("unfinished/mds/**/*.mds"),
    ),
    *(
        Target(layout, (layout,), (f"{layout}/**/*",), ("data_prep", *PREPARE, layout, "prepared"))
        for layout in ("folder", "archives", "kaggle", "parquet")
    ),
)
