"""What each node of a job downloads of a set in an object store, and how well a batch is mixed, in
one group of shards and in many.

    python -m benchmarks.nodes

Nodes are played one after another on this machine, two ranks each, with a cache each, from moto's
S3 server on loopback. How batches are mixed is reckoned from the order alone.
"""

import logging
import os
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.sources import Npz
from data_prep.upload import upload
from tarflow_dist.data.loader import train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import open_shards
from tarflow_dist.data.store import ObjectStore

IMAGES, BATCH, WINDOW, RANKS, SET = 24_000, 256, 16, 2, "s3://bucket/mds"
SIZES, LIKE_IN256 = [577] * 2220 + [227], 768  # shards of 64 MB and a batch
fetched = 0


def serve_set(scratch: Path) -> int:
    """24,000 images of noise, 32x32, in 290 shards; returns the bytes of these."""
    import boto3
    from moto.server import ThreadedMotoServer

    rng = np.random.default_rng(0)
    for name, count in (("train_data_batch_1", IMAGES), ("val_data", 100)):
        pixels = rng.integers(0, 256, (count, 3 * 32 * 32), np.uint8)
        np.savez(scratch / name, data=pixels, labels=rng.integers(1, 1001, count))
    prepare(
        Npz(scratch), scratch / "out", ["mds"], Settings(size=32, encode="raw", shard_bytes=1 << 18)
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    where = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {**keys, "AWS_DEFAULT_REGION": "us-east-1", "S3_ENDPOINT_URL": where}
    boto3.client("s3", endpoint_url=where).create_bucket(Bucket="bucket")
    size = sum(file.stat().st_size for file in (scratch / "out/mds/train").glob("*.mds"))
    upload(scratch / "out" / "mds", SET)
    return size


def count_bytes() -> None:
    """Adds up in `fetched` what is downloaded."""
    fetch = ObjectStore._fetch

    def counted(store: ObjectStore, name: str, local: Path) -> None:
        global fetched
        fetch(store, name, local)
        if name.startswith("train/"):
            fetched += local.stat().st_size

    ObjectStore._fetch = counted


def downloads(node: int, nodes: int, groups: int) -> list[int]:
    """Bytes of a node in each of two epochs; its cache holds 40 % of the set."""
    with tempfile.TemporaryDirectory() as cache:
        limit = int(0.4 * IMAGES * 3072) + 10_000_000  # and the records
        shards = open_shards(SET, "train", cache=Path(cache), cache_limit=limit)
        order = ImageOrder(shards.sizes, seed=0, window=WINDOW, groups=groups)
        of_ranks = [
            train_batches(
                shards,
                order,
                position=0,
                batch_size=BATCH,
                micro_batch_size=BATCH // (RANKS * nodes),
                rank=rank,
                world_size=RANKS * nodes,
                num_workers=0,
            )
            for rank in range(RANKS * node, RANKS * (node + 1))
        ]
        seen = [fetched]
        for _ in range(2):
            for _ in islice(zip(*of_ranks, strict=True), len(order) // BATCH):
                pass
            seen.append(fetched)
        return np.diff(seen).tolist()


def mixing(batches: list[np.ndarray]) -> str:
    """Of two epochs' orders, each (images,), cut into batches: shards and classes in a batch, and
    how often two images of a batch are in one again in the next epoch, to what chance would have.
    Classes are 1,000, at random."""
    rng = np.random.default_rng(0)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    class_of = rng.integers(0, 1000, len(shard_of))
    shards, classes = (
        np.mean([len(np.unique(of[batch])) for batch in batches[0]]) for of in (shard_of, class_of)
    )
    batch_of = np.full((2, len(shard_of)), -1)
    for epoch, cut in enumerate(batches):
        np.put_along_axis(batch_of[epoch], cut.ravel(), np.arange(cut.size) // LIKE_IN256, 0)
    both = (batch_of >= 0).all(0)
    met = np.unique(batch_of[0, both] * len(batches[0]) + batch_of[1, both], return_counts=True)[1]
    pairs = np.bincount(batch_of[0, both])
    chance = (pairs * (pairs - 1)).sum() * (LIKE_IN256 - 1) / (both.sum() - 1)
    return f"{shards:.0f} | {classes:.0f} | {(met * (met - 1)).sum() / chance:.2f}"


def main() -> None:
    print(
        "| groups | shards in a batch | classes | pairs met again, to chance |\n|---|---|---|---|"
    )
    total = sum(SIZES) // LIKE_IN256 * LIKE_IN256
    for groups in (1, 16, 64, 256):
        order = ImageOrder(SIZES, seed=0, window=WINDOW, groups=groups)
        epochs = [order.epoch_permutation(epoch)[:total] for epoch in (0, 1)]
        print(f"| {groups} | {mixing([epoch.reshape(-1, LIKE_IN256) for epoch in epochs])} |")
    rng = np.random.default_rng(1)
    shuffled = [rng.permutation(sum(SIZES))[:total].reshape(-1, LIKE_IN256) for _ in range(2)]
    print(f"| the whole set shuffled | {mixing(shuffled)} |\n")

    print("| nodes | groups | MB a node, first epoch | second epoch | all nodes, to the set |")
    print("|---|---|---|---|---|")
    count_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        whole = serve_set(Path(scratch))
        for nodes in (1, 2, 4):
            for groups in (1, 64):
                got = np.array([downloads(node, nodes, groups) for node in range(nodes)])
                first, second = (
                    f"{low / 1e6:.1f} to {high / 1e6:.1f}"
                    for low, high in zip(got.min(0), got.max(0), strict=True)
                )
                all_nodes = " and ".join(f"{share:.2f}" for share in got.sum(0) / whole)
                print(f"| {nodes} | {groups} | {first} | {second} | {all_nodes} |", flush=True)
        print(f"\nThe set has {whole / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
