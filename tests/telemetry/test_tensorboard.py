"""log.tensorboard: what TensorBoard itself reads of it."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tarflow_dist.config import LogConfig
from tarflow_dist.errors import UserError
from tarflow_dist.telemetry.metrics_log import Metrics, read_metrics

LOG = LogConfig(every_images=10, wandb="disabled", tensorboard=True)


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """The first start is killed past its checkpoint at 20 images; all it logged is there."""
    picture = tmp_path / "20.png"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    first = Metrics(tmp_path, LOG, {}, images=0, wandb_id="")
    for images in (10, 20, 30, 40):
        first.log({"images": images, "loss": 1 / images, "lr": float("nan")})
    for images in (20, 30):
        first.log_picture(images, picture)
    second = Metrics(tmp_path, LOG, {}, images=20, wandb_id="")
    second.log({"images": 30, "loss": 0.5, "val_loss": 0.75})
    second.close()

    events = EventAccumulator(str(tmp_path / "tensorboard" / "training")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "val_loss"}
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    rows = [(row["images"], row["loss"]) for row in read_metrics(tmp_path)]
    assert read == [(step, np.float32(value)) for step, value in rows]
    assert [step for step, _ in read] == [10, 20, 30]
    (shown,) = events.Images("preview")
    assert shown.step == 20
    assert (np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))) == pixels).all()
    first.close()


def test_it_is_said_when_tensorboard_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'tarflow_dist\[tensorboard\]'"):
        Metrics(tmp_path, LOG, {}, images=0, wandb_id="")
