"""The sample store: what is written is read back, left and taken up again, or refused."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.sample_store import SampleStore, decode_png, encode_png

SETTINGS = {"num_samples": 10, "chunk_size": 4, "seed": 0, "guidance": 1.5}


def a_store(folder: Path, **changes: Any) -> SampleStore:
    store = SampleStore(folder, SETTINGS | changes)
    store.begin()
    return store


def some_images(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 6, 6, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels: int) -> None:
    (image,) = some_images(1, channels)
    np.testing.assert_array_equal(decode_png(encode_png(image)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_chunk_comes_back_as_it_was(tmp_path: Path, channels: int) -> None:
    store = a_store(tmp_path / "samples")
    images = some_images(4, channels)
    store.write_chunk(1, images, np.array([3, 1, -1, 0]))
    np.testing.assert_array_equal(store.read_images(1), images)
    np.testing.assert_array_equal(store.read_images(1, rows=[2, 0]), images[[2, 0]])
    assert store.read_labels(1).tolist() == [3, 1, -1, 0]


def test_columns_on_disk(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store = a_store(tmp_path)
    store.write_chunk(2, some_images(2), np.array([0, 1]))
    table = pq.read_table(tmp_path / "samples-000002.parquet")
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("index", "int64"),
        ("label", "int64"),
        ("png", "binary"),
    ]
    assert table["index"].to_pylist() == [8, 9]


def test_chunks_cover_the_samples(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert [list(store.chunk_indexes(c)) for c in range(store.num_chunks)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


def test_the_same_settings_take_up_what_is_missing(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert store.missing_chunks() == [0, 1, 2]
    store.write_chunk(1, some_images(4), np.zeros(4, np.int64))
    assert a_store(tmp_path).missing_chunks() == [0, 2]


def test_a_chunk_cut_off_while_written_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    def killed(table: Any, part: Path, **_: Any) -> None:
        part.write_bytes(b"half a fi")
        raise KeyboardInterrupt

    store = a_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write_chunk(0, some_images(4), np.zeros(4, np.int64))
    assert a_store(tmp_path).missing_chunks() == [0, 1, 2]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    a_store(tmp_path).write_chunk(0, some_images(4), np.zeros(4, np.int64))
    with pytest.raises(UserError) as caught:
        a_store(tmp_path, seed=7, guidance=2.0)
    assert "made with seed 0, not 7; guidance 1.5, not 2.0:" in str(caught.value)
    assert json.loads((tmp_path / "settings.json").read_text()).items() >= SETTINGS.items()


def test_settings_without_samples_may_be_corrected(tmp_path: Path) -> None:
    a_store(tmp_path)
    a_store(tmp_path, seed=7)
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 7


def test_samples_of_unknown_settings_are_refused(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.write_chunk(0, some_images(4), np.zeros(4, np.int64))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"no settings\.json"):
        a_store(tmp_path)
    for rubbish in ("", "[1]"):
        (tmp_path / "settings.json").write_text(rubbish)
        with pytest.raises(UserError, match=r"settings\.json can't be read \(.*\): empty"):
            a_store(tmp_path)


def test_a_chunk_comes_back_as_it_was_or_is_named(tmp_path: Path) -> None:
    """Cut short, emptied, and a bit flipped in each of 150 places: damage to a picture is always
    seen, damage elsewhere may not matter."""
    store = a_store(tmp_path)
    images = some_images(4)
    store.write_chunk(0, images, np.array([0, 1, 2, 3]))
    file = store.chunk_file(0)
    whole = file.read_bytes()
    pictures = range(whole.index(b"\x89PNG"), whole.rindex(b"IEND"))
    broken = [(whole[:-20], True), (b"", True)]
    for place in np.random.default_rng(0).choice(len(whole), 150, replace=False):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        broken.append((bytes(flipped), int(place) in pictures))
    for content, matters in broken:
        file.write_bytes(content)
        problem = _read_problem(store, images)
        assert problem is None or "samples-000000.parquet is damaged: delete it" in problem
        assert not (matters and problem is None)


def _read_problem(store: SampleStore, images: np.ndarray) -> str | None:
    try:
        np.testing.assert_array_equal(store.read_images(0), images)
    except UserError as error:
        return str(error)
    return None


def test_the_digest_is_of_labels_and_pixels(tmp_path: Path) -> None:
    """Whatever the order of writing and the device; given for others to check."""
    images, labels = some_images(10), np.arange(10)
    parts = [slice(0, 4), slice(4, 8), slice(8, 10)]
    stores = [a_store(tmp_path / "a"), a_store(tmp_path / "b")]
    for store, order, device in zip(stores, ((0, 1, 2), (2, 0, 1)), ("cpu", "gpu"), strict=True):
        for chunk in order:
            store.write_chunk(chunk, images[parts[chunk]], labels[parts[chunk]], device=device)
    chunks = [
        sha256(labels[part].astype("<i8").tobytes() + images[part].tobytes()).hexdigest()
        for part in parts
    ]
    assert stores[0].sha256() == sha256("".join(chunks).encode()).hexdigest()
    assert stores[0].sha256() == stores[1].sha256()
    assert (stores[0].devices(), stores[1].devices()) == (["cpu"], ["gpu"])


def test_a_chunk_under_another_chunks_name_is_refused(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    for chunk in (0, 1):
        store.write_chunk(chunk, some_images(4, seed=chunk), np.arange(4))
    store.chunk_file(1).write_bytes(store.chunk_file(0).read_bytes())
    for read in (store.read_images, store.read_labels, store.read_stored):
        with pytest.raises(UserError, match=r"samples-000001\.parquet is damaged"):
            read(1)
