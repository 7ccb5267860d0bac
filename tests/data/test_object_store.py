"""Sets in an object store, over HTTP: the same images, through a cache that stays in its bounds."""

import multiprocessing
import os
import random
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_prep.upload import upload
from tarflow_dist.data.loader import train_batches
from tarflow_dist.data.order import ImageOrder
from tarflow_dist.data.shards import Shards, open_shards
from tarflow_dist.errors import UserError

FORMATS = ["mds", "wds"]


@pytest.fixture(scope="module")
def remote(digits: Path, s3: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits in their dozen shards, uploaded."""
    copy = shutil.copytree(digits, tmp_path_factory.mktemp("upload") / "digits")
    for form in FORMATS:
        upload(copy / form, f"s3://bucket/digits/{form}")
    return "s3://bucket/digits"


def cached(cache: Path) -> int:
    return sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_those_of_the_folder(
    remote: str, digits: Path, form: str, tmp_path: Path
) -> None:
    far = open_shards(f"{remote}/{form}", "val", cache=tmp_path / "cache")
    near = open_shards(digits / form, "val")
    assert (far.sizes, far.num_classes, far.image_shape) == (
        near.sizes,
        near.num_classes,
        near.image_shape,
    )
    assert far.manifest.read_bytes() == near.manifest.read_bytes()
    for index in range(len(near)):
        assert np.array_equal(far[index][0], near[index][0])
        assert far[index][1] == near[index][1]


@pytest.mark.parametrize("form", FORMATS)
def test_batches_come_through_workers_and_shards_once(
    remote: str, digits: Path, form: str, tmp_path: Path, s3: object
) -> None:
    def batches(shards: Shards) -> list[torch.Tensor]:
        loaded = train_batches(
            shards,
            ImageOrder(shards.sizes, seed=0, window=2),
            position=1490,
            batch_size=20,
            micro_batch_size=20,
            rank=0,
            world_size=1,
            num_workers=2,
        )
        return [batch.images for batch in islice(loaded, 40)]

    before = Counter(s3.downloads(f"/{form}/train/"))
    far = open_shards(f"{remote}/{form}", "train", cache=tmp_path / "cache")
    near = open_shards(digits / form, "train")
    for a, b in zip(batches(far), batches(near), strict=True):
        assert torch.equal(a, b)
    got = Counter(s3.downloads(f"/{form}/train/")) - before
    assert got
    assert set(got.values()) == {1}
    assert len(got) < len(near.sizes) + 1


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_node_downloads_its_share(remote: str, nodes: int, tmp_path: Path, s3: object) -> None:
    """Two ranks on each. All over an epoch, each node no more than the shards it shares beyond."""
    shards = open_shards(f"{remote}/mds", "train", cache=tmp_path / "records")
    order = ImageOrder(shards.sizes, seed=0, window=2, groups=8)
    seen = []
    for node in range(nodes):
        near = open_shards(f"{remote}/mds", "train", cache=tmp_path / str(node))
        before = len(s3.downloads("/mds/train/"))
        for rank in (2 * node, 2 * node + 1):
            batches = train_batches(
                near,
                order,
                position=len(order),  # the second epoch
                batch_size=16,
                micro_batch_size=16 // (2 * nodes),
                rank=rank,
                world_size=2 * nodes,
                num_workers=0,
            )
            for batch in islice(batches, len(order) // 16):
                seen += batch.index.tolist()
        got = Counter(s3.downloads("/mds/train/")[before:])
        assert set(got.values()) == {1}
        assert len(shards.sizes) / nodes <= len(got) <= len(shards.sizes) / nodes + 2
    assert len(set(seen)) == len(seen) == len(order) // 16 * 16


def test_nothing_is_downloaded_that_is_not_read(remote: str, tmp_path: Path, s3: object) -> None:
    before = len(s3.downloads("/mds/train/"))
    shards = open_shards(f"{remote}/mds", "train", cache=tmp_path)
    assert len(s3.downloads("/mds/train/")) == before
    _ = shards[sum(shards.sizes[:3])]
    assert s3.downloads("/mds/train/")[before:] == ["/bucket/digits/mds/train/shard.00003.mds"]


def test_the_cache_stays_in_its_limit_and_keeps_what_was_used_last(
    remote: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    limit = 4 * 45_000 + 200_000  # a few shards, and the records
    shards = open_shards(f"{remote}/mds", "train", cache=cache, cache_limit=limit)
    firsts = np.cumsum([0, *shards.sizes[:-1]]).tolist()
    for first in firsts:
        _ = shards[firsts[0]], shards[first]  # the first shard is always among the last used
        assert cached(cache) <= limit
    kept = {int(file.name.split(".")[1]) for file in cache.rglob("*.mds")}
    assert {0, len(firsts) - 1} <= kept
    assert len(kept) < len(firsts)


def read_at_random(shards: Shards, seed: int, expected: list[np.ndarray]) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        index = rng.randrange(len(expected))
        if not np.array_equal(shards[index][0], expected[index]):
            os._exit(3)
    os._exit(0)


@pytest.mark.parametrize("form", FORMATS)
def test_processes_share_a_cache_too_small_for_them(
    remote: str, digits: Path, form: str, tmp_path: Path
) -> None:
    """Shards come and go all the time under four readers: none ever sees a part of one."""
    near = open_shards(digits / form, "train")
    expected = [near[index][0] for index in range(len(near))]
    cache = tmp_path / "cache"
    largest = max(file.stat().st_size for file in (digits / form / "train").iterdir())
    limit = 3 * largest + 600_000  # and the records
    shards = open_shards(f"{remote}/{form}", "train", cache=cache, cache_limit=limit)
    context = multiprocessing.get_context("fork")
    readers = [
        context.Process(target=read_at_random, args=(shards, seed, expected)) for seed in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=120)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert not list(cache.rglob("*.part*"))
    assert cached(cache) <= limit


def test_a_file_removed_while_it_is_read_is_read_to_its_end(
    remote: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(f"{remote}/mds", "val", cache=tmp_path)
    pread = os.pread

    def late(file: int, size: int, offset: int) -> bytes:
        for shard in tmp_path.rglob("*.mds"):
            shard.unlink()
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", late)
    near = open_shards(digits / "mds", "val")
    for index in (0, 1, 250):
        assert np.array_equal(shards[index][0], near[index][0])


def test_what_a_killed_download_left_is_no_shard(remote: str, digits: Path, tmp_path: Path) -> None:
    shards = open_shards(f"{remote}/mds", "val", cache=tmp_path)
    _ = shards[0]
    (shard,) = tmp_path.rglob("*.mds")
    for name in (f"{shard.name}.part", f"{shard.name}.part.Ab12Cd34"):
        shard.with_name(name).write_bytes(b"half of it")
    shard.unlink()
    assert np.array_equal(shards[1][0], open_shards(digits / "mds", "val")[1][0])
    assert not list(tmp_path.rglob("*.part*"))


def test_a_set_written_anew_is_not_taken_for_the_old(
    digits: Path, s3: object, tmp_path: Path
) -> None:
    for form in FORMATS:  # another set under one address: its summary differs
        copy = shutil.copytree(digits / form, tmp_path / form / "mds")
        summary = copy / "summary.json"
        summary.write_text(
            summary.read_text().replace('"seed": 0', f'"seed": {len(form)}{form == "wds":d}')
        )
        upload(copy, "s3://bucket/again/mds")
        shards = open_shards("s3://bucket/again/mds", "val", cache=tmp_path / "cache")
        assert {"mds": ".mds", "wds": ".tar"}[form] in str(sorted(shards._names))
        assert np.array_equal(shards[3][0], open_shards(digits / form, "val")[3][0])


def refused(address: str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_shards(address, "train", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_user_errors_are_one_sentence(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("s3://bucket/nothing/mds", "s3://no-bucket/digits/mds", "what://is/this"):
        assert f"can't read {address}/summary.json" in refused(address, cache=tmp_path)
    shards = open_shards(f"{remote}/mds", "train", cache=tmp_path, cache_limit=50_000)
    with pytest.raises(UserError, match=r"but 4 shards of s3://bucket/digits/mds are read from at"):
        shards.check_cache(4)
    said = refused(f"{remote}/mds", cache=tmp_path, cache_limit=5_000)
    assert "but 1 shards of s3://bucket/digits/mds are read from at a time" in said
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect" in refused("s3://bucket/elsewhere/mds", cache=tmp_path)


def test_a_full_cache_is_one_sentence(remote: str, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4_080_000))
    said = refused(f"{remote}/mds", cache=small_disk / "cache")
    assert f" in {small_disk}/cache (No space left on device): make room there, or name" in said
    ballast.unlink()
    assert open_shards(f"{remote}/mds", "train", cache=small_disk / "cache")[0]


def test_a_shard_that_is_gone_is_named(digits: Path, s3: object, tmp_path: Path) -> None:
    copy = shutil.copytree(digits / "mds", tmp_path / "up" / "mds")
    upload(copy, "s3://bucket/gone/mds")
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.delete_object(Bucket="bucket", Key="gone/mds/val/shard.00001.mds")
    client.put_object(Bucket="bucket", Key="gone/mds/val/shard.00000.mds", Body=b"not this")
    shards = open_shards("s3://bucket/gone/mds", "val", cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"can't read s3://bucket/gone/mds/val/shard\.00001\.mds"):
        _ = shards[shards.sizes[0]]  # the first of the second shard
    with pytest.raises(UserError, match=r"s3://bucket/gone/mds/val/shard\.00000\.mds, is damaged"):
        _ = shards[0]


@pytest.mark.parametrize("name", ["{outside}/x.mds", "../../outside/x.mds", "train/../../../x.mds"])
def test_a_set_writes_nothing_outside_its_cache(
    name: str, digits: Path, s3: object, tmp_path: Path
) -> None:
    """A stranger's manifest names a shard that is there, where a download would put it outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    copy = shutil.copytree(digits / "mds", tmp_path / "copy")
    table = pq.read_table(copy / "manifest.parquet")
    shard = name.format(outside=outside)
    first = table["shard"][0].as_py()
    names = [shard if old == first else old for old in table["shard"].to_pylist()]
    place = table.schema.get_field_index("shard")
    pq.write_table(table.set_column(place, "shard", pa.array(names)), copy / "manifest.parquet")
    upload(copy, "s3://bucket/hostile/mds")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is damaged"):
        open_shards("s3://bucket/hostile/mds", "train", cache=tmp_path / "cache")
    new = set(tmp_path.rglob("*")) - before
    assert all((tmp_path / "cache") in [file, *file.parents] for file in new)


def test_a_shard_damaged_in_the_cache_is_fetched_again(
    remote: str, digits: Path, tmp_path: Path
) -> None:
    far = open_shards(f"{remote}/mds", "val", cache=tmp_path / "cache")
    near = open_shards(digits / "mds", "val")
    _ = far[0]
    for file in (tmp_path / "cache").rglob("*.mds"):
        file.write_bytes(bytes(file.stat().st_size))
    assert np.array_equal(far[0][0], near[0][0])


def test_a_shard_damaged_in_the_store_is_named_with_both_places_until_it_is_mended(
    digits: Path, s3: object, tmp_path: Path
) -> None:
    whole = (digits / "mds" / "val" / "shard.00000.mds").read_bytes()
    upload(shutil.copytree(digits / "mds", tmp_path / "up"), "s3://bucket/mended/mds")
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    place = {"Bucket": "bucket", "Key": "mended/mds/val/shard.00000.mds"}
    client.put_object(**place, Body=bytes(len(whole)))
    shards = open_shards("s3://bucket/mended/mds", "val", cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"s3://bucket/mended/mds/val.*fetched again to /.*cache/"):
        _ = shards[0]
    client.put_object(**place, Body=whole)
    assert np.array_equal(shards[0][0], open_shards(digits / "mds", "val")[0][0])
