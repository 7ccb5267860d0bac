"""Files that outlive the code: those of other versions, changed by hand, or damaged in a bit."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import pytest
import torch

from tarflow_dist import TarFlow
from tarflow_dist import config_file as configs
from tarflow_dist.config import CheckpointConfig, Config
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.sample_store import SampleStore
from tarflow_dist.files import from_saved, read_sealed, write_sealed
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.flow.guidance import Guidance
from tarflow_dist.flow.jacobi import SEQUENTIAL
from tarflow_dist.models.sampling_policy import Calibration, Policy, read_policy
from tarflow_dist.training import checkpoint
from tarflow_dist.training.checkpoint import Piece, RunState
from tarflow_dist.training.run_folder import changes_since_start, read_status, write_status
from tarflow_dist.training.saver import Saver

# as the first version wrote them
STATE = """{"state": {"images": 256, "optimizer_steps": 4, "skipped": 0, "skipped_in_a_row": 0,
"mean_loss": 0.5, "wandb_id": ""}, "model": {"image_size": 8, "patch_size": 2, "in_channels": 1,
"width": 64, "num_blocks": 2, "layers_per_block": 1, "head_dim": 64, "num_classes": 10,
"volume_preserving": false, "noise": "gaussian", "sigma": 0.1}, "files": {}}"""
SIZES = json.loads(STATE)["model"]
SETTINGS = {"num_samples": 4, "chunk_size": 2, "seed": 0}


def test_a_state_of_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(STATE)
    saved = checkpoint.Checkpoint(tmp_path)
    assert saved.state == RunState(images=256, optimizer_steps=4, mean_loss=0.5)
    assert saved.model == FlowConfig(**SIZES)


def test_a_state_from_before_a_field_and_after_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text(STATE)
    later = make_dataclass("Later", [("rollbacks", int, field(default=0))], bases=(RunState,))
    monkeypatch.setattr(checkpoint, "RunState", later)
    assert checkpoint.Checkpoint(tmp_path).state.rollbacks == 0

    @dataclass
    class Earlier:
        images: int = 0
        optimizer_steps: int = 0

    monkeypatch.setattr(checkpoint, "RunState", Earlier)
    with pytest.raises(UserError, match="does not know its mean_loss"):
        checkpoint.Checkpoint(tmp_path)
    (tmp_path / "state.json").write_text(STATE.replace('"mean_loss": 0.5', '"mean_loss": null'))
    assert checkpoint.Checkpoint(tmp_path).state == Earlier(256, 4)


def test_a_model_from_before_a_field_and_after_one() -> None:
    assert from_saved(FlowConfig, SIZES | {"gone": False}) == FlowConfig(**SIZES)
    with pytest.raises(ValueError, match="does not know its gone"):
        from_saved(FlowConfig, SIZES | {"gone": 3})
    with pytest.raises(ValueError, match=r"missing .* 'width'"):
        from_saved(FlowConfig, {k: v for k, v in SIZES.items() if k != "width"})


def write_state(folder: Path) -> Path:
    saver = Saver(folder, CheckpointConfig(every_images=1), FlowConfig(**SIZES))
    saver.save([Piece("a", torch.Size([2]), 0, {"ema": torch.ones(2)})], RunState(images=128))
    saver.publish()
    return folder / "00000000128" / "state.json"


def read_state(file: Path) -> object:
    saved = checkpoint.Checkpoint(file.parent)
    saved.verify()
    return saved.state, saved.model


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    TarFlow(**SIZES).save_pretrained(folder)
    return folder / "config.json"


def write_weights(folder: Path) -> Path:
    write_model(folder)
    return folder / "model.safetensors"


def read_model(file: Path) -> object:
    flow = TarFlow.from_pretrained(file.parent)
    return flow.config, flow.provenance, sum(p.double().sum().item() for p in flow.parameters())


def write_policy(folder: Path) -> Path:
    calibration = Calibration("cpu, 1 threads", "float32", 4, Guidance(1.0), (SEQUENTIAL,) * 2)
    Policy("abc").with_calibration(calibration).write(folder)
    return folder / "sampling.json"


def read_sampling(file: Path) -> object:
    return read_policy(file.parent, fingerprint="abc", num_blocks=2)


def write_settings(folder: Path) -> Path:
    SampleStore(folder, SETTINGS).begin()
    (folder / "samples-000000.parquet").touch()
    return folder / "settings.json"


def read_settings(file: Path) -> object:
    return SampleStore(file.parent, SETTINGS).settings


def write_run_status(folder: Path) -> Path:
    write_status(folder, {"state": "running", "images": 128, "error": None})
    return folder / "status.json"


def read_run_status(file: Path) -> object:
    status = read_status(file.parent)
    return [status.get(name) for name in ("state", "images", "error")]


FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "state.json": (write_state, read_state),
    "config.json": (write_model, read_model),
    "sampling.json": (write_policy, read_sampling),
    "settings.json": (write_settings, read_settings),
    "status.json": (write_run_status, read_run_status),
}


@pytest.mark.parametrize("name", [*FORMATS, "model.safetensors"])
def test_no_flipped_bit_makes_another_of_it(name: str, tmp_path: Path) -> None:
    write, read = FORMATS.get(name, (write_weights, read_model))
    file = write(tmp_path)
    data, whole = file.read_bytes(), read(file)
    noticed, tried = 0, range(0, 8 * len(data), max(5, 8 * len(data) // 400))
    for bit in tried:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = read(file)
        except UserError:
            noticed += 1
        else:  # it was white space, or what only says that there is a hash
            assert found == whole
    assert noticed > 0.5 * len(tried)


@pytest.mark.parametrize("name", FORMATS)
def test_versions_and_changes_by_hand(name: str, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    file = write(tmp_path)
    whole = read(file)
    content = json.loads(file.read_text())
    newest = content.pop("version")
    assert newest == (2 if name == "state.json" else 1)
    seal = content.pop("xxh3_128")
    file.write_text(json.dumps(content))  # as before there was a version or a hash
    assert read(file) == whole
    file.write_text(json.dumps({**content, "more": 1, "xxh3_128": seal}))
    with pytest.raises(UserError, match="if the change is meant, take its xxh3_128 out"):
        read(file)
    write_sealed(file, content, version=newest + 1)
    with pytest.raises(UserError, match=rf"format is version {newest + 1}, .* up to {newest}"):
        read(file)


def test_what_is_sealed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    content = {"text": "ü", "numbers": [1, 0.1, 1e300, None, True], "nested": {"a": {}}}
    write_sealed(file, content, version=3)
    assert read_sealed(file, version=3) == read_sealed(file, version=4) == content
    assert json.loads(file.read_text())["version"] == 3


def run_of(folder: Path, change: Callable[[str], str]) -> Config:
    """A run that was started with the digits' recipe, as `change` has it."""
    digits = Path(__file__).parents[1] / "configs" / "digits.yaml"
    config = configs.load(digits, [f"run={folder}"])
    (folder / "config.yaml").write_text(change(configs.dump(config)))
    return config


def test_a_run_from_before_a_setting_and_after_one(tmp_path: Path) -> None:
    config = run_of(tmp_path, lambda text: text.replace("version: 1", "version: 2"))
    with pytest.raises(UserError, match="is of version 2, and this tarflow_dist knows up to 1"):
        changes_since_start(config)
    run_of(tmp_path, lambda text: text.replace("version: 1\n", ""))
    assert changes_since_start(config) == []
    config = run_of(tmp_path, lambda text: text.replace("  offload: false\n", ""))
    assert changes_since_start(config) == []
    config = run_of(tmp_path, lambda text: text.replace("health:\n", "health:\n  gone: 7\n"))
    assert changes_since_start(config) == ["health.gone, which was 7, is no setting any more"]
    config = run_of(tmp_path, lambda text: text + "gone:\n  a: 1\n")
    assert changes_since_start(config) == ["gone, which was {'a': 1}, is no setting any more"]
    run_of(tmp_path, lambda text: text.replace("model:\n", "model:\n  gone: null\n"))
    assert len(changes_since_start(config)) == 1
    run_of(tmp_path, lambda text: text.replace("model:\n", "model:\n  gone: 7\n"))
    with pytest.raises(UserError, match=r"has model.gone 7, which this version .* not know"):
        changes_since_start(config)
