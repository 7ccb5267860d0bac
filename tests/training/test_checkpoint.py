import json
from pathlib import Path

import pytest
import torch

from tarflow_dist.errors import UserError
from tarflow_dist.training.checkpoint import Checkpoint, newest, save
from tarflow_dist.training.state import RunState

TENSORS = {"weights/a": torch.randn(3, 4), "ema/a": torch.randn(3, 4), "buffers/v": torch.ones(2)}


def write(folder: Path, images: int, keep: int = 2) -> Path:
    entries = [(key, tensor.numel(), lambda t=tensor: t) for key, tensor in TENSORS.items()]
    return save(folder, entries, RunState(images=images), model={"width": 64}, keep=keep)


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    saved = Checkpoint(write(tmp_path, 12_800))
    assert saved.state == RunState(images=12_800)
    assert saved.model == {"width": 64}
    for key, tensor in TENSORS.items():
        assert torch.equal(saved.read(key), tensor)
    assert saved.read_all("ema").keys() == {"a"}


def test_the_last_ones_are_kept_and_found(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    folders = [write(tmp_path, images) for images in (128, 256, 12_800)]
    assert newest(tmp_path) == folders[-1]
    assert [f.exists() for f in folders] == [False, True, True]
    assert (tmp_path / "latest").read_text() == "00000012800\n"


def test_what_a_killed_save_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    whole = write(tmp_path, 128)
    part = tmp_path / ".00000000256.part"
    part.mkdir()
    (part / "tensors-00000.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == whole
    assert Checkpoint(write(tmp_path, 256)).state.images == 256
    assert not part.exists()


def test_the_pointer_decides(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 128), write(tmp_path, 256)
    (tmp_path / "latest").write_text(older.name)
    assert newest(tmp_path) == older
    (tmp_path / "latest").unlink()  # as if killed before the first pointer was written
    assert newest(tmp_path) == newer


@pytest.mark.parametrize("damage", ["cut", "missing", "no state", "bad state", "other model"])
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path, 128)
    tensors, state = folder / "tensors-00000.safetensors", folder / "state.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no state":
        state.unlink()
    elif damage == "bad state":
        state.write_text(state.read_text()[:-10])
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).read("weights/b" if damage == "other model" else "weights/a")
    assert str(folder) in str(caught.value)


def test_nothing_in_it_is_pickled(tmp_path: Path) -> None:
    folder = write(tmp_path, 128)
    kinds = {file.suffix for file in folder.iterdir()}
    assert kinds == {".json", ".safetensors"}
    json.loads((folder / "state.json").read_text())


def test_a_future_that_was_given_up_is_removed(tmp_path: Path) -> None:
    for images in (100, 200, 300):
        write(tmp_path, images, keep=3)
    (tmp_path / "latest").write_text("00000000100\n")
    written = write(tmp_path, 150, keep=2)
    assert newest(tmp_path) == written
    assert {int(p.name) for p in tmp_path.iterdir() if p.is_dir()} == {100, 150}


def test_a_full_disk_is_told_and_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = write(tmp_path, 128)

    def full(tensors: dict, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tarflow_dist.training.checkpoint.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path, 256)
    assert newest(tmp_path) == earlier
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [earlier.name]
