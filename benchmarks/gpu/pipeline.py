"""The user's commands end to end, the loader, and the feature network."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.models import ROOT, Bench, attempt
from benchmarks.loader import batches_of
from benchmarks.pictures import write_photos
from tarflow_dist.data.shards import open_shards
from tarflow_dist.training.maximum_likelihood import augment


def commands(bench: Bench) -> Iterator[dict[str, Any]]:
    """Shards, training, conversion, samples and distance on the digits."""
    images = 640 if bench.tiny else 19_200
    precision = "bf16" if bench.cuda else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        fid = ("tarflow_dist.sample_fid", "--model", there / "model", "--features", "pixels")
        fid += ("--reference", there / "shards/mds", "--guidance", 1)
        fid += ("--num-samples", 40 if bench.tiny else 500)
        train = ("tarflow_dist.train", "configs/digits.yaml", f"run={there / 'run'}")
        train += (f"data.path={there / 'shards/mds'}", f"train.precision={precision}")
        train += (f"train.images={images}", "optimizer.warmup_images=320", "log.wandb=disabled")
        again = ("first",) if bench.tiny else ("first", "second")
        lines: dict[str, tuple[object, ...]] = {
            "data_prep": ("data_prep", "digits", there / "shards"),
            "train": train,
            "convert": ("tarflow_dist.convert", there / "run", there / "model"),
            **{f"sample_fid, {out}": (*fid, "--out", there / out) for out in again},
        }
        for name, words in lines.items():
            yield {name: attempt(partial(seconds_of, bench, words))}
        results = [json.loads((there / out / "result.json").read_text()) for out in again]
        first = results[0]
        yield {
            "result": {
                "distance": first["frechet_distance"],
                "device": first["device"],
                "seconds": first["seconds"],
                "same samples": len({result["samples_sha256"] for result in results}) == 1,
            }
        }


def seconds_of(bench: Bench, words: tuple[object, ...]) -> float:
    command = [sys.executable, "-m", *map(str, words)]

    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: …{done.stderr[-250:]}")

    return round(bench.seconds(run), 2)


def loader(bench: Bench) -> Iterator[dict[str, Any]]:
    """Images a second from shards to noisy images on the device, by workers."""
    batch, count, photos = (4, 8, 40) if bench.tiny else (64, 120, 2000)
    config = bench.config("in64", "model.in_channels=3")
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        write_photos(there / "photos", photos)
        size = config.model.image_size
        prepare = ("data_prep", "folder", there / "photos", there / "shards", "--size", size)
        yield {"prepared in": seconds_of(bench, prepare)}
        shards = open_shards(there / "shards/mds", "train")
        for workers in (0, 2) if bench.tiny else (0, 4, 8, 15):

            def rate(workers: int = workers) -> float:
                batches = batches_of(shards, batch, workers)
                for one in islice(batches, 3):  # until the workers are up
                    augment(one, config, torch.device(bench.device))

                def feed() -> None:
                    for one in islice(batches, count):
                        augment(one, config, torch.device(bench.device))

                return round(batch * count / bench.seconds(feed))

            yield {f"images/s, {workers} workers": attempt(rate)}


def inception(bench: Bench) -> Iterator[dict[str, Any]]:
    """Images a second of FID's Inception v3, with random weights."""

    def rate() -> float:
        network = random_inception().to(bench.device)
        batch = 2 if bench.tiny else 100
        images = torch.randint(256, (batch, 3, 64, 64), dtype=torch.uint8, device=bench.device)
        network(images)
        return round(batch / bench.seconds(lambda: network(images)), 1)

    yield {"images/s": attempt(rate)}


def random_inception() -> torch.nn.Module:
    """torch-fidelity loads weights from a file as it builds the network: here it is given none."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with (
        tempfile.NamedTemporaryFile(suffix=".pth") as empty,
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.save({}, empty.name)
        return FeatureExtractorInceptionV3(
            "random", ["2048"], feature_extractor_weights_path=empty.name
        )
