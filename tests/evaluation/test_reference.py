"""The reference command: every image once, whatever the number of ranks, and no pickle."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import ranks
import torch

from tarflow_dist.data.shards import open_shards
from tarflow_dist.errors import UserError
from tarflow_dist.files import sha256
from tarflow_dist.reference import main


@pytest.mark.e2e
def test_every_image_once_as_it_is_stored(digits: Path, tmp_path: Path) -> None:
    """Held-out digits: 297 images, on 2 ranks."""
    file = tmp_path / "new" / "digits.npz"
    options = ("--split", "val", "--features", "pixels", "--batch-size", 20)
    log, command = tmp_path / "log", ("tarflow_dist.reference", digits / "wds", file)
    assert "297 images" in ranks.run_command(log, *command, *options, "--keep", 100, ranks=2)

    shards = open_shards(digits / "mds", "val")
    x = np.stack([shards[i][0].reshape(-1) / 127.5 - 1 for i in range(len(shards))])
    with np.load(file, allow_pickle=False) as npz:
        np.testing.assert_allclose(npz["mu"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(npz["sigma"], np.cov(x, rowvar=False), rtol=1e-9, atol=1e-14)
        spread = np.linspace(0, 296, 100).round().astype(int)
        np.testing.assert_allclose(npz["features"], x[spread], atol=1e-6)
        about = json.loads(str(npz["about"]))
    assert about["count"] == about["reference_images"] == 297
    assert (about["features"], about["image_shape"]) == ("pixels", [1, 8, 8])
    assert about["class_names"] == [str(d) for d in range(10)]
    assert about["reference_sha256"] == sha256(digits / "wds" / "manifest.parquet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shards", "out.npy"], "ends in .npz"),
        (["shards", "out.npz", "--keep", "0"], "must be at least 1"),
        (["shards", "out.npz"], "need their weights on disk"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


@pytest.mark.parametrize("name", ["taken.npz", "file/out.npz"])
def test_a_file_that_cant_be_written_is_told_before_anything_is_measured(
    name: str, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken.npz").mkdir()
    (tmp_path / "file").touch()
    with (
        mock.patch("tarflow_dist.distributed.init", return_value=torch.device("cpu")),
        mock.patch("tarflow_dist.evaluation.measure.measure_reference", side_effect=AssertionError),
        pytest.raises(UserError, match=f"{name} (is a folder|can't be written)"),
    ):
        main([str(digits / "mds"), str(tmp_path / name), "--features", "pixels"])
