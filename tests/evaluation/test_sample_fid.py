"""The command: what it refuses before it draws, and whole runs on one and two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.measure import check_image_shape
from tarflow_dist.pretrained import TarFlow
from tarflow_dist.sample_fid import (
    check_arguments,
    parse_arguments,
    sample_settings,
    sha256,
)

COMMAND = ["-m", "tarflow_dist.sample_fid"]


def save_model(folder: Path, num_classes: int) -> TarFlow:
    """A model of the digits' size with random weights, far enough from the identity to differ
    between labels."""
    torch.manual_seed(0)
    flow = TarFlow(
        image_size=8,
        patch_size=2,
        in_channels=1,
        width=16,
        head_dim=8,
        num_blocks=2,
        layers_per_block=1,
        num_classes=num_classes,
        sigma=0.1,
    )
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    flow.save_pretrained(folder)
    return flow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, num_classes=10)
    return folder


def run(*command: str) -> subprocess.CompletedProcess[str]:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets it for two ranks
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=one_thread
    )


def arguments(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--reference", str(model), "--num-samples", "10", *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-samples", "1"], "--num-samples must be at least 2"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--reference", "nowhere"], "--reference nowhere is not a folder"),
        (["--features", "inception"], "need their weights on disk"),
        (["--inception-weights", "nowhere.pth"], r"nowhere\.pth is not a file"),
    ],
)
def test_bad_arguments(model: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_arguments(parse_arguments(arguments(model, *more)))


@pytest.mark.parametrize(
    ("num_classes", "more", "message"),
    [
        (0, ["--guidance", "1"], "guidance needs class labels"),
        (10, ["--attn-temp", "0.9"], "give a guidance above 0"),
        (10, ["--guidance", "-1"], "must be a number, 0 or more"),
        (0, ["--labels", "balanced"], "leave --labels out"),
    ],
)
def test_options_the_model_cannot_have(
    tmp_path: Path, num_classes: int, more: list[str], message: str
) -> None:
    flow = save_model(tmp_path, num_classes)
    with pytest.raises(UserError, match=message):
        sample_settings(parse_arguments(arguments(tmp_path, *more)), flow)


def test_settings_follow_the_model(model: Path) -> None:
    flow = TarFlow.from_pretrained(model)
    settings = sample_settings(parse_arguments(arguments(model, "--no-denoise")), flow)
    assert settings["weights_sha256"] == sha256(model / "model.safetensors")
    assert settings["labels"] == "random"
    assert settings["denoise"] is False
    assert json.loads(json.dumps(settings)) == settings


def test_reference_of_another_shape() -> None:
    with pytest.raises(UserError, match="are 3×32×32 and the model's are 1×8×8"):
        check_image_shape(Path("shards"), (3, 32, 32), (1, 8, 8))


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(*COMMAND, *arguments(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stderr == f"error: --model {tmp_path / 'nowhere'} is not a folder\n"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    done = run("-m", "data_prep", "digits", str(out), "--format", "mds")
    assert done.returncode == 0, done.stderr
    return out / "mds"


@pytest.mark.e2e
def test_one_and_two_ranks_and_a_resumed_run_agree(
    model: Path, digits: Path, tmp_path: Path
) -> None:
    def sample_fid(launcher: list[str], out: Path, *more: str) -> None:
        options = ["--reference", str(digits), "--num-samples", "50", "--batch-size", "16"]
        options += ["--features", "pixels", "--guidance", "1", "--annealed", "--out", str(out)]
        done = run(*launcher, *COMMAND, "--model", str(model), *options, *more)
        assert done.returncode == 0, done.stderr

    def outcome(out: Path) -> tuple[bytes, dict]:
        return (out / "samples.npz").read_bytes(), json.loads((out / "result.json").read_text())

    two_ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sample_fid([], tmp_path / "one")
    samples, result = outcome(tmp_path / "one")
    sample_fid(two_ranks, tmp_path / "two")
    samples_two, result_two = outcome(tmp_path / "two")
    assert samples == samples_two
    assert result_two["frechet_distance"] == pytest.approx(result["frechet_distance"], rel=1e-9)
    images_there = json.loads((digits / "summary.json").read_text())["images"]["train"]
    assert (result_two["world_size"], result_two["reference_images"]) == (2, images_there)

    with np.load(tmp_path / "one" / "samples.npz", allow_pickle=False) as npz:
        images, labels = npz["arr_0"], npz["arr_1"]
    assert images.shape == (50, 8, 8, 1)
    assert len(np.unique(labels)) > 5
    assert (tmp_path / "one" / "grid.png").exists()

    (tmp_path / "two" / "samples-000002.parquet").unlink()
    sample_fid([], tmp_path / "two")
    samples_resumed, result_resumed = outcome(tmp_path / "two")
    assert result_resumed["chunks_drawn"] == 1
    assert samples_resumed == samples
