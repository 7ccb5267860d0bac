"""Checkpoints of every kind into a model folder, against the weights they were made from."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tarflow_dist import TarFlow, convert
from tarflow_dist.config import CheckpointConfig
from tarflow_dist.errors import UserError
from tarflow_dist.flow.config import FlowConfig
from tarflow_dist.flow.model import Flow
from tarflow_dist.training.checkpoint import Piece, RunState
from tarflow_dist.training.saver import Saver

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
        assert getattr(flow.config, ours) == settings[theirs]


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
    pieces = [
        Piece(name, tensor.shape, 0, {kind: tensor.view(-1)})
        for kind, tensors in kinds.items()
        for name, tensor in tensors.items()
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    saver = Saver(run / "checkpoints", CheckpointConfig(every_images=1), FlowConfig(**SIZES))
    saver.save(pieces, RunState(images=256))
    saver.publish()
    return run, kinds


@pytest.mark.parametrize(("option", "kind"), [("ema", "ema"), ("raw", "weights")])
@pytest.mark.parametrize("of", ["run", "checkpoint"])
def test_a_run(option: str, kind: str, of: str, run_folder: tuple, tmp_path: Path) -> None:
    run, kinds = run_folder
    source = run if of == "run" else run / "checkpoints" / "00000000256"
    out = tmp_path / "model"
    convert.main([str(source), str(out), f"--weights={option}"])
    flow = TarFlow.from_pretrained(out)
    assert flow.config == FlowConfig(**SIZES)
    assert flow.provenance["images"] == 256
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, (kinds[kind] | kinds["buffers"])[name])


@pytest.mark.e2e
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 1), (3, 2)])
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


@pytest.mark.parametrize("rubbish", ["text", "pickle", "cut", "flip", "other network", "a list"])
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
    elif rubbish == "flip":
        whole = bytearray(published_file("cond", tmp_path).read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    elif rubbish == "other network":
        torch.save({"conv.weight": torch.ones(3)}, file)
    else:
        torch.save([torch.ones(3)], file)
    with pytest.raises(UserError, match=r"rubbish\.pth") as caught:
        convert.main([str(file), "model", "--sigma=0.05"])
    assert "weights_only" not in str(caught.value)  # torch's advice is to run what is hidden there
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


def saved_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(Flow(**SIZES).state_dict())


def wrapped_in_lightning() -> object:
    weights = {f"model.{name}": tensor for name, tensor in saved_weights().items()}
    return {
        "state_dict": {**weights, "loss.scale": torch.ones(1)},
        "epoch": 3,
        "hyper_parameters": {"lr": 1e-4},
    }


def wrapped_in_a_trainer() -> object:
    flow = Flow(**SIZES)
    flow.load_state_dict(saved_weights())
    optimizer = torch.optim.AdamW(flow.parameters())
    return {"model": flow.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}


def averaged() -> object:
    flow = Flow(**SIZES)
    flow.load_state_dict(saved_weights())
    return torch.optim.swa_utils.AveragedModel(flow).state_dict()


def wrapped_in_fsdp() -> object:
    prefix = "_fsdp_wrapped_module."
    return {f"{prefix}{name}": tensor for name, tensor in saved_weights().items()}


def in_a_list() -> object:
    return {"ema": [saved_weights()], "step": 1}


@pytest.mark.parametrize(
    "content",
    [wrapped_in_lightning, wrapped_in_a_trainer, averaged, wrapped_in_fsdp, in_a_list],
)
def test_the_one_model_in_a_file_is_found(content: Callable[[], object], tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "a.pth")
    options = ["--sigma=0.1", "--in-channels=1", "--head-dim=16"]
    convert.main([str(tmp_path / "a.pth"), str(tmp_path / "model"), *options])
    found = TarFlow.from_pretrained(tmp_path / "model").state_dict()
    expected = saved_weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_several_models_are_listed(tmp_path: Path) -> None:
    first, second = saved_weights(), {n: t + 1 for n, t in saved_weights().items()}
    nested = {f"ema.{name}": tensor for name, tensor in second.items()}
    torch.save({"model": first, "more": nested}, tmp_path / "a.pth")
    command = [str(tmp_path / "a.pth"), str(tmp_path / "model"), "--sigma=0.1", "--in-channels=1"]
    command.append("--head-dim=16")
    with pytest.raises(UserError, match=r"choose one with --key, 'model' or 'more\.ema'"):
        convert.main(command)
    with pytest.raises(UserError, match="no model under --key ema: there is 'model' or"):
        convert.main([*command, "--key=ema"])
    convert.main([*command, "--key=more.ema"])
    found = TarFlow.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], second[name]) for name in second)


def test_tied_weights_come_apart(tmp_path: Path) -> None:
    weights = saved_weights()
    weights["blocks.1.class_embed"] = weights["blocks.0.class_embed"]
    weights["blocks.0.proj_in.bias"] = torch.arange(64.0)[:32]  # a part of something larger
    torch.save(weights, tmp_path / "a.pth")
    options = ["--sigma=0.1", "--in-channels=1", "--head-dim=16"]
    convert.main([str(tmp_path / "a.pth"), str(tmp_path / "model"), *options])
    found = TarFlow.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.999999999.pos_embed": torch.ones(16, 32)}, "its blocks.999999999.pos_embed is"),
        ({"blocks.0.attn_blocks.999999999.mlp.norm.bias": torch.ones(32)}, "makes no TARFlow"),
        ({"var": torch.ones(16, 4).to_sparse()}, "its var is a sparse tensor"),
        ({"var": torch.ones(16, 4, device="meta")}, "its var is a tensor without values"),
        ({"var": torch.ones(16, 4).to(torch.float8_e4m3fn)}, "its var is of float8_e4m3fn"),
        ({"var": torch.ones(16, 4, dtype=torch.complex64)}, "its var is of complex64"),
        ({"var": "text"}, "its var is no tensor, but str"),
        ({"var": torch.full((16, 4), torch.nan)}, "its var is not finite"),
        ({"blocks.0.proj_in.bias": torch.full((32,), torch.inf)}, "its blocks.0.proj_in.bias is"),
        (
            {"blocks.0.pos_embed": torch.ones(10**6, 32)},
            "is of another model|makes no",
        ),
    ],
)
def test_odd_weights_are_a_sentence(change: dict, said: str, tmp_path: Path) -> None:
    torch.save(saved_weights() | change, tmp_path / "a.pth")
    options = ["--sigma=0.1", "--in-channels=1", "--head-dim=16"]
    with pytest.raises(UserError, match=said):
        convert.main([str(tmp_path / "a.pth"), str(tmp_path / "model"), *options])
    assert not (tmp_path / "model").exists()


def test_what_a_type_cannot_hold(tmp_path: Path) -> None:
    weights = saved_weights()
    weights["var"] = weights["var"] * 1e30
    torch.save(weights, tmp_path / "a.pth")
    options = ["--sigma=0.1", "--in-channels=1", "--head-dim=16", "--dtype=float16"]
    with pytest.raises(UserError, match="its var in float16 is not finite"):
        convert.main([str(tmp_path / "a.pth"), str(tmp_path / "model"), *options])


def test_a_published_itarflow(tmp_path: Path) -> None:
    weights = load_file(GOLDEN / "itarflow.weights.safetensors")
    torch.save(weights, tmp_path / "a.pth")
    command = [str(tmp_path / "a.pth"), str(tmp_path / "model")]
    with pytest.raises(UserError, match="is an iTARFlow, for which --sigma-range says the noise"):
        convert.main([*command, "--sigma=0.1"])
    plain = str(published_file("cond", tmp_path))
    with pytest.raises(UserError, match="is a TARFlow, for which --sigma says the noise"):
        convert.main([plain, str(tmp_path / "model"), "--sigma-range", "0.01", "0.3"])
    convert.main([*command, "--sigma-range", "0.01", "0.3"])
    flow = TarFlow.from_pretrained(tmp_path / "model")
    v = load_file(GOLDEN / "itarflow.vectors.safetensors")
    z, _ = flow(v["x"], v["y"], v["sigma"])
    assert (z - v["forward.z"]).abs().max() < 1e-10
