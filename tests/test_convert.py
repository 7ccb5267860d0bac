"""Checkpoints of every kind into a model folder, against the weights they were made from."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tarflow_dist import TarFlow, convert
from tarflow_dist.config import CheckpointConfig
from tarflow_dist.errors import UserError
from tarflow_dist.flow.model import Flow
from tarflow_dist.training.saver import Saver
from tarflow_dist.training.state import RunState

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
SHARED_GOLDEN = HERE.parents[1] / "shared" / "golden"
CASES = ["cond", "uncond", "volume_preserving"]
SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "width": 32,
    "num_blocks": 2,
    "layers_per_block": [1, 2],
    "head_dim": 16,
    "num_classes": 3,
    "volume_preserving": False,
    "noise": "gaussian",
    "sigma": 0.1,
}


def published_file(case: str, folder: Path) -> Path:
    """A published checkpoint: the state dict with its causal masks, as torch.save writes it."""
    weights = load_file(GOLDEN / f"{case}.weights.safetensors")
    num_patches = weights["blocks.0.pos_embed"].shape[0]
    for t in range(2):
        weights[f"blocks.{t}.attn_mask"] = torch.ones(num_patches, num_patches).tril()
    file = folder / f"{case}.pth"
    torch.save(weights, file)
    return file


def assert_equals_golden(case: str, model: Path) -> None:
    flow = TarFlow.from_pretrained(model)
    vectors = load_file(GOLDEN / f"{case}.vectors.safetensors")
    z, _ = flow(vectors["x"], vectors.get("y") if flow.num_classes else None)
    assert (z - vectors["forward.z"]).abs().max() < 1e-10
    settings = json.loads((GOLDEN / f"{case}.json").read_text())
    for ours, theirs in {
        "image_size": "img_size",
        "patch_size": "patch_size",
        "in_channels": "in_channels",
        "width": "channels",
        "num_blocks": "num_blocks",
        "layers_per_block": "layers_per_block",
        "num_classes": "num_classes",
        "sigma": "sigma",
    }.items():
        assert flow.config[ours] == settings[theirs]


def channels_of(case: str) -> str:
    return str(json.loads((GOLDEN / f"{case}.json").read_text())["in_channels"])


@pytest.mark.parametrize("case", CASES)
def test_a_published_file(case: str, tmp_path: Path) -> None:
    file, out = published_file(case, tmp_path), tmp_path / "model"
    convert.main([str(file), str(out), "--sigma=0.05", "--in-channels", channels_of(case)])
    assert_equals_golden(case, out)


@pytest.mark.skipif(not SHARED_GOLDEN.is_dir(), reason="shared/golden is not beside the checkout")
@pytest.mark.parametrize("case", CASES)
def test_the_files_that_the_published_code_wrote(case: str, tmp_path: Path) -> None:
    file, out = SHARED_GOLDEN / f"{case}.weights.pth", tmp_path / "model"
    convert.main([str(file), str(out), "--sigma=0.05", "--in-channels", channels_of(case)])
    assert_equals_golden(case, out)


def test_the_type_changes_only_on_request(tmp_path: Path) -> None:
    file = published_file("cond", tmp_path)
    convert.main([str(file), str(tmp_path / "same"), "--sigma=0.05"])
    convert.main([str(file), str(tmp_path / "bf16"), "--sigma=0.05", "--dtype=bfloat16"])
    original = load_file(GOLDEN / "cond.weights.safetensors")
    for folder, dtype in (("same", torch.float64), ("bf16", torch.bfloat16)):
        saved = load_file(tmp_path / folder / "model.safetensors")
        for name, tensor in saved.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, original[name].to(dtype))


@pytest.fixture
def run_folder(tmp_path: Path) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """A run with one checkpoint, and what is in it."""
    torch.manual_seed(0)
    names = {name: p.shape for name, p in Flow(**SIZES).named_parameters()}
    kinds = {k: {n: torch.randn(s) for n, s in names.items()} for k in ("weights", "ema")}
    kinds["buffers"] = {"var": torch.rand(16, 4)}
    entries = [
        (f"{kind}/{name}", tensor.numel(), lambda t=tensor: t)
        for kind, tensors in kinds.items()
        for name, tensor in tensors.items()
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    saver = Saver(run / "checkpoints", CheckpointConfig(every_images=1), SIZES)
    saver.save(entries, RunState(images=256))
    saver.finish()
    return run, kinds


@pytest.mark.parametrize(("option", "kind"), [("ema", "ema"), ("raw", "weights")])
@pytest.mark.parametrize("of", ["run", "checkpoint"])
def test_a_run(option: str, kind: str, of: str, run_folder: tuple, tmp_path: Path) -> None:
    run, kinds = run_folder
    source = run if of == "run" else run / "checkpoints" / "00000000256"
    out = tmp_path / "model"
    convert.main([str(source), str(out), f"--weights={option}"])
    flow = TarFlow.from_pretrained(out)
    assert flow.config == SIZES
    assert flow.provenance["images"] == 256
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, (kinds[kind] | kinds["buffers"])[name])


@pytest.mark.e2e
@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 1), (3, 2)])
def test_a_deepspeed_checkpoint_of_another_program(stage: int, ranks: int, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    worker = HERE / "foreign_deepspeed_worker.py"
    command = [sys.executable, *launcher, str(worker), str(saved), str(stage)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    out = tmp_path / "model"
    with pytest.raises(UserError, match="--trust-pickle"):
        convert.main([str(saved), str(out), "--sigma=0.1", "--in-channels=1"])
    convert.main([str(saved), str(out), "--sigma=0.1", "--in-channels=1", "--trust-pickle"])
    expected = torch.load(tmp_path / "expected.pt")
    flow = TarFlow.from_pretrained(out)
    assert flow.state_dict().keys() == expected.keys()
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, expected[name])


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("rubbish", ["text", "pickle", "cut", "other network", "a list"])
def test_rubbish_is_refused_and_never_run(
    rubbish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("rubbish.pth")
    if rubbish == "text":
        file.write_text("hello")
    elif rubbish == "pickle":
        file.write_bytes(pickle.dumps({"a": Bomb()}))
    elif rubbish == "cut":
        whole = published_file("cond", tmp_path).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif rubbish == "other network":
        torch.save({"conv.weight": torch.ones(3)}, file)
    else:
        torch.save([torch.ones(3)], file)
    with pytest.raises(UserError, match=r"rubbish\.pth"):
        convert.main([str(file), "model", "--sigma=0.05"])
    assert not Path("exploded").exists()
    assert not Path("model").exists()


def test_what_a_source_leaves_open_must_be_said(tmp_path: Path) -> None:
    file, out = str(published_file("volume_preserving", tmp_path)), str(tmp_path / "model")
    for arguments, sentence in [
        ([], "--sigma S or --uniform"),
        (["--sigma=0.1", "--uniform"], "--sigma S or --uniform"),
        (["--sigma=0.1"], "--in-channels"),
    ]:
        with pytest.raises(UserError, match=sentence):
            convert.main([file, out, *arguments])
    convert.main([file, out, "--uniform", "--in-channels=1"])
    assert TarFlow.from_pretrained(out).noise == "uniform"


def test_no_model_is_overwritten_and_nothing_is_nothing(tmp_path: Path, run_folder: tuple) -> None:
    run, _ = run_folder
    convert.main([str(run), str(tmp_path / "model")])
    with pytest.raises(UserError, match="holds a model already"):
        convert.main([str(run), str(tmp_path / "model")])
    with pytest.raises(UserError, match="there is no"):
        convert.main([str(tmp_path / "nothing"), str(tmp_path / "other")])
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "young" / "config.yaml").touch()
    with pytest.raises(UserError, match="no checkpoint yet"):
        convert.main([str(tmp_path / "young"), str(tmp_path / "other")])


def test_options_that_do_not_apply_are_refused(tmp_path: Path, run_folder: tuple) -> None:
    run, _ = run_folder
    with pytest.raises(UserError, match="--in-channels does not apply"):
        convert.main([str(run), str(tmp_path / "model"), "--in-channels=1"])
    file = published_file("cond", tmp_path)
    with pytest.raises(UserError, match="--weights does not apply"):
        convert.main([str(file), str(tmp_path / "model"), "--sigma=0.1", "--weights=raw"])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--sigma=-1", "sigma is -1.0"),
        ("--sigma=nan", "sigma is nan"),
        ("--in-channels=0", "must be 1 or more"),
        ("--head-dim=48", "width 64 is not a multiple of head_dim 48"),
    ],
)
def test_numbers_that_make_no_model(option: str, sentence: str, tmp_path: Path) -> None:
    file = published_file("cond", tmp_path)
    with pytest.raises(UserError, match=sentence):
        convert.main([str(file), str(tmp_path / "model"), "--sigma=0.1", option])


def test_wrapped_names_and_old_files_are_understood(tmp_path: Path) -> None:
    weights = torch.load(published_file("cond", tmp_path))
    wrapped = {
        f"_orig_mod.module.{name.replace('attn_blocks.0.', 'attn_blocks.0._orig_mod.')}": tensor
        for name, tensor in weights.items()
    }
    file = tmp_path / "wrapped.pth"
    torch.save(wrapped, file, _use_new_zipfile_serialization=False)
    convert.main([str(file), str(tmp_path / "model"), "--sigma=0.05"])
    assert_equals_golden("cond", tmp_path / "model")
