import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tarflow_dist.config import CheckpointConfig
from tarflow_dist.errors import UserError
from tarflow_dist.files import describe, write_sealed
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.training.checkpoint import Checkpoint, Piece, RunState, newest_whole, open_run
from tarflow_dist.training.latest_checkpoint import give_up_after, newest
from tarflow_dist.training.saver import Saver

MODEL = FlowConfig(
    image_size=8, patch_size=2, width=64, num_blocks=2, layers_per_block=[1, 2], sigma=0.1
)
TENSORS = {"weights/a": torch.randn(3, 4), "ema/a": torch.randn(3, 4), "buffers/v": torch.ones(2)}


def pieces(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    """Whole, as one rank has them."""
    split = [(*key.split("/"), tensor) for key, tensor in tensors.items()]
    return [Piece(name, t.shape, 0, {kind: t.view(-1)}) for kind, name, t in split]


def saver(folder: Path, **config: object) -> Saver:
    return Saver(folder, CheckpointConfig(every_images=1, **config), MODEL)


def start(writing: Saver, images: int, val_loss: float | None = None) -> None:
    writing.save(pieces(TENSORS), RunState(images=images, mean_loss=0.5, val_loss=val_loss))


def write(folder: Path, images: int, **config: object) -> Path:
    writing = saver(folder, **{"keep": 2, **config})
    start(writing, images)
    writing.publish()
    return folder / f"{images:011d}"


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    saved = Checkpoint(write(tmp_path, 12_800))
    saved.verify()
    assert saved.state == RunState(images=12_800, mean_loss=0.5)
    assert saved.model == MODEL
    for key, tensor in TENSORS.items():
        assert torch.equal(saved.read(key), tensor)
    assert saved.read_all("ema").keys() == {"a"}


@pytest.fixture(params=[1, 2])
def in_two_files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint as each version lays it down, and its one tensor's average."""
    a, folder = torch.randn(5, 4), tmp_path / f"{128:011d}"
    folder.mkdir()
    flat = a.flatten()
    files = [{"weights/a": -a}, {"ema/a": a}]
    index = {}
    if request.param == 2:
        files = [{"weights/a": -part, "ema/a": part} for part in (flat[7:], flat[:7])]
        index["shapes"] = {"weights/a": [5, 4], "ema/a": [5, 4]}
        index["starts"] = {
            "tensors-00000.safetensors": {"a": 7},
            "tensors-00001.safetensors": {"a": 0},
        }
    content = {"state": {"images": 128}, "model": MODEL.to_json(), "files": {}}
    for rank, tensors in enumerate(files):
        file = folder / f"tensors-{rank:05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        content["files"][file.name] = describe(file)
    write_sealed(folder / "state.json", content | index, version=request.param)
    return folder, a


def test_parts_of_tensors_are_read_wherever_they_lie(
    in_two_files: tuple[Path, torch.Tensor],
) -> None:
    folder, a = in_two_files
    saved = Checkpoint(folder)
    saved.verify()
    assert torch.equal(saved.read("ema/a"), a)
    assert saved.read_all("weights").keys() == {"a"}
    for start in range(20):
        for stop in range(start, 21):
            assert torch.equal(saved.read_part("ema/a", start, stop), a.flatten()[start:stop])
            assert torch.equal(saved.read_part("weights/a", start, stop), -a.flatten()[start:stop])


def test_it_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """Training changes the weights while they are written."""
    weights = torch.zeros(1000)
    writing = saver(tmp_path)
    writing.save(pieces({"weights/a": weights}), RunState(images=128))
    weights += 1
    assert newest(tmp_path) is None
    writing.publish()
    assert Checkpoint(newest(tmp_path)).read("weights/a").eq(0).all()


def test_the_last_ones_are_kept_and_found(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    folders = [write(tmp_path, images) for images in (128, 256, 12_800)]
    assert newest(tmp_path) == folders[-1]
    assert [f.exists() for f in folders] == [False, True, True]
    assert (tmp_path / "latest").read_text() == "00000012800\n"


def test_the_best_one_stays(tmp_path: Path) -> None:
    losses = {100: 3.0, 200: 1.0, 300: None, 400: 2.0, 500: 1.5, 600: 0.5, 700: 0.75}
    left = []
    for images, loss in losses.items():
        writing = saver(tmp_path, keep=1, keep_best=True)
        start(writing, images, loss)
        writing.publish()
        left.append(sorted(int(path.name) for path in tmp_path.glob("0*")))
    assert left == [[100], [200], [200, 300], [200, 400], [200, 500], [600], [600, 700]]


def test_permanent_ones_stay(tmp_path: Path) -> None:
    """The first past each multiple of 1000."""
    for images in range(300, 3900, 300):
        write(tmp_path, images, keep=1, permanent_every_images=1000)
    kept = {int(p.name) for p in tmp_path.iterdir() if p.is_dir()}
    assert kept == {1200, 2100, 3000, 3600}


def test_a_full_disk_keeps_nothing_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the shares are there and the last small file is not."""
    whole = write(tmp_path, 128)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tarflow_dist.training.saver.write_sealed", full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        write(tmp_path, 256)
    assert newest(tmp_path) == whole
    assert not list(tmp_path.glob(".*"))


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


def a_link(pointer: Path) -> None:
    pointer.unlink()
    pointer.symlink_to(f"{128:011d}")


def a_pipe(pointer: Path) -> None:
    pointer.unlink()
    os.mkfifo(pointer)


BAD_POINTERS: dict[str, Callable[[Path], object]] = {
    "empty": lambda pointer: pointer.write_bytes(b""),
    "cut": lambda pointer: pointer.write_bytes(b"000000"),
    "lower": lambda pointer: pointer.write_bytes(b"00000000001\n"),
    "higher": lambda pointer: pointer.write_bytes(b"00000099999\n"),
    "NUL": lambda pointer: pointer.write_bytes(bytes(12)),
    "climbs": lambda pointer: pointer.write_bytes(b"../../other/checkpoints/00000000128"),
    "not UTF-8": lambda pointer: pointer.write_bytes(b"\xff\xfe\x00"),
    "huge": lambda pointer: pointer.write_bytes(b"9" * 10_000_000),
    "link to a folder": a_link,
    "pipe": a_pipe,
}


@pytest.mark.parametrize("spoil", BAD_POINTERS.values(), ids=BAD_POINTERS)
def test_a_bad_pointer_is_named_and_costs_nothing(
    spoil: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_three = [write(tmp_path, images, keep=3) for images in (128, 256, 384)]
    spoil(tmp_path / "latest")
    saved = newest_whole(tmp_path)
    assert saved is not None
    assert saved.folder == all_three[-1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'latest'} ")
    assert line.endswith(": the newest whole checkpoint is taken")
    give_up_after(saved.folder)
    assert all(folder.is_dir() for folder in all_three)
    following = write(tmp_path, 512, keep=4)
    assert (tmp_path / "latest").read_text() == f"{following.name}\n"
    assert all(folder.is_dir() for folder in all_three)


def cut(folder: Path) -> None:
    file = folder / "tensors-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(folder: Path) -> None:
    file = folder / "tensors-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def lose_tensors(folder: Path) -> None:
    (folder / "tensors-00000.safetensors").unlink()


def lose_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def cut_state(folder: Path) -> None:
    file = folder / "state.json"
    file.write_text(file.read_text()[:-10])


def test_one_rank_of_several_that_opens_it_alone_verifies_all_of_it(
    in_two_files: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 of a job does, which converts the run's newest checkpoint."""
    folder, _ = in_two_files
    monkeypatch.setattr("tarflow_dist.distributed.world_size", lambda: 2)
    assert open_run(folder).state.images == 128
    file = folder / "tensors-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"tensors-00001\.safetensors is damaged"):
        open_run(folder)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lose_tensors, lose_state, cut_state])
def test_a_damaged_one_is_named_and_the_one_before_it_used(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = write(tmp_path, 128), write(tmp_path, 256)
    damage(newer)
    saved = newest_whole(tmp_path)
    assert saved is not None
    assert saved.folder == older
    assert f"{newer} is not a whole checkpoint (" in capsys.readouterr().err
    damage(older)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        newest_whole(tmp_path)  # and not a silent start from nothing


def test_one_of_another_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks weights/b"):
        Checkpoint(write(tmp_path, 128)).read("weights/b")


def test_nothing_in_it_is_pickled(tmp_path: Path) -> None:
    folder = write(tmp_path, 128)
    kinds = {file.suffix for file in folder.iterdir()}
    assert kinds == {".json", ".safetensors"}
    json.loads((folder / "state.json").read_text())


def test_a_future_that_was_given_up_is_removed_once_it_is_passed(tmp_path: Path) -> None:
    for images in (100, 200, 300):
        write(tmp_path, images, keep=3)
    (tmp_path / "latest").write_text("00000000100\n")

    def there() -> set[str]:
        return {p.name.lstrip("0") for p in tmp_path.iterdir() if p.is_dir()}

    write(tmp_path, 150, keep=4)
    assert there() == {"100", "150", "200", "300"}  # nobody has given them up
    chosen = newest(tmp_path)
    assert chosen is not None
    give_up_after(chosen)
    assert there() == {"100", "150", "200.given-up", "300.given-up"}
    write(tmp_path, 250, keep=4)
    assert there() == {"100", "150", "250", "300.given-up"}
    write(tmp_path, 300, keep=4)
    assert there() == {"100", "150", "250", "300"}


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", "a\0b"])
def test_its_files_are_its_own(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 128)
    content = json.loads((folder / "state.json").read_text())
    (described,) = content["files"].values()
    (folder / "tensors-00000.safetensors").rename(tmp_path / "outside.safetensors")
    del content["xxh3_128"]  # by hand, and as before there was one
    (folder / "state.json").write_text(json.dumps({**content, "files": {name: described}}))
    with pytest.raises(UserError, match=r"is not a whole checkpoint \('.*' (leads|is no)"):
        Checkpoint(folder)


def test_a_full_disk_is_told_and_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, tensors: dict) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    earlier = write(tmp_path, 128)
    monkeypatch.setattr("tarflow_dist.training.saver.write_tensors", full)
    writing = saver(tmp_path)
    start(writing, 256)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        writing.publish()
    assert newest(tmp_path) == earlier
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [earlier.name]


def test_no_flipped_bit_in_its_state_goes_unnoticed(tmp_path: Path) -> None:
    folder = write(tmp_path, 128)
    whole, file = Checkpoint(folder), folder / "state.json"
    data = file.read_bytes()
    noticed = 0
    for bit in range(0, 8 * len(data), 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            saved = Checkpoint(folder)
            saved.verify()
        except UserError:
            noticed += 1
        else:  # in white space, or the name of the hash
            assert (saved.state, saved.model) == (whole.state, whole.model)
    assert noticed > 0.7 * 8 * len(data) / 3


def test_a_state_of_before_it_had_a_hash_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 128)
    file = folder / "state.json"
    content = json.loads(file.read_text())
    del content["xxh3_128"]
    file.write_text(json.dumps(content))
    assert Checkpoint(folder).state.images == 128
