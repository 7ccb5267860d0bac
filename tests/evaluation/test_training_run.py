"""What arrives at Weights & Biases, in its offline file, and in TensorBoard's."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tarflow_dist import config_file as configs
from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.metrics import FIGURES
from tarflow_dist.evaluation.report import TrainingRun, find_training_run, log_to_run


def test_figures_and_pictures_stand_with_the_training_run(tmp_path: Path) -> None:
    results = {}
    for place, name in enumerate(("guidance-0-denoise-1", "guidance-2-denoise-1")):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((6, 4), 100, np.uint8)).save(folder / "grid.png")
        results[name] = dict.fromkeys(FIGURES) | {"frechet_distance": 3.5 - place}
    run = tmp_path / "run"
    run.mkdir()
    log = LogConfig(every_images=1, wandb="offline", tensorboard=True)
    log_to_run(TrainingRun(run, log, "abc123", 12_800), tmp_path / "out", results)
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert file.name == "run-abc123.wandb"
    content = file.read_bytes()  # protocol buffers, names and JSON values in the clear
    for part in (
        b"evaluation/guidance-0-denoise-1/frechet_distance",
        b"3.5",
        b"evaluation/guidance-2-denoise-1/frechet_distance",
        b"2.5",
        b"evaluation/guidance-2-denoise-1/samples",
        b"12800",
    ):
        assert part in content
    assert b"recall" not in content
    pictures = sorted(run.glob("wandb/offline-run-*/files/media/images/evaluation/*/*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(4, 6), (4, 6)]
    events = EventAccumulator(str(run / "tensorboard" / "evaluation")).Reload()
    (event,) = events.Scalars("evaluation/guidance-2-denoise-1/frechet_distance")
    assert (event.step, event.value) == (12_800, 2.5)
    (picture,) = events.Images("evaluation/guidance-2-denoise-1/samples")
    assert (picture.width, picture.height) == (4, 6)


def test_a_run_that_logs_nothing_or_has_no_checkpoint(tmp_path: Path) -> None:
    lines = ["log.wandb=disabled"]
    config = configs.load(Path("configs/digits.yaml"), lines)
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    with pytest.raises(UserError, match=r"trained with log\.wandb=disabled"):
        find_training_run(tmp_path, {})
    (tmp_path / "config.yaml").write_text(configs.dump(configs.load(Path("configs/digits.yaml"))))
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_training_run(tmp_path, {})
