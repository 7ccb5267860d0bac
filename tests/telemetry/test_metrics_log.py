"""metrics.jsonl: what can't be read is cut off and said, and rows come before their checkpoint."""

import json
import os
from pathlib import Path

import pytest

from tarflow_dist.config import LogConfig
from tarflow_dist.telemetry.dashboards import Wandb
from tarflow_dist.telemetry.metrics_log import Metrics, plot_loss, read_metrics

ROWS = "".join(json.dumps({"images": images, "loss": 0.5}) + "\n" for images in (10, 20, 30))


def metrics(run: Path, images: int = 30) -> Metrics:
    return Metrics(
        run, LogConfig(every_images=10, wandb="disabled"), {}, images=images, wandb_id=""
    )


@pytest.mark.parametrize(
    "tail",
    [
        b"garbage\n",
        b"\xff\xfe\x00\n",
        bytes(512),
        bytes(512) + b"\n",
        b"[" * 100_000 + b"\n",
        b"[]\n",
        b'{"loss": 1}\n',
        b'{"images": "40"}\n',
        b'{"images": 40, "loss": "0.5"}\n',
        b"\n",
    ],
)
def test_rows_that_cant_be_read_are_cut_off_and_named(
    tail: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(ROWS.encode() + tail + ROWS.encode())
    assert [row["images"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    opened = metrics(tmp_path)
    assert f"{file}: line 4 can't be read" in capsys.readouterr().err
    assert file.read_text() == ROWS
    opened.log({"images": 40, "loss": 0.25})
    opened.close()
    assert [row["images"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40]


def test_half_a_line_is_dropped_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(ROWS + '{"images": 4')
    metrics(tmp_path, images=20).close()
    assert capsys.readouterr().err == ""
    assert [row["images"] for row in read_metrics(tmp_path)] == [10, 20]


def test_rows_are_on_disk_when_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written, was in the file by the time that the system was asked to flush it."""
    flushed = {}

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        flushed[status.st_ino] = status.st_size

    opened = metrics(tmp_path)
    opened.log({"images": 10, "loss": 0.5})
    monkeypatch.setattr("os.fsync", fsync)
    opened.sync()
    written = (tmp_path / "metrics.jsonl").stat()
    assert flushed == {written.st_ino: written.st_size}
    opened.close()


class BrokenWandb(Wandb):
    id = "abc"

    def __init__(self, *_: object) -> None:
        pass

    def log(self, row: object) -> None:
        raise RuntimeError("its process died")


def test_wandbs_trouble_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tarflow_dist.telemetry.dashboards.Wandb", BrokenWandb)
    log = LogConfig(every_images=10, wandb="offline")
    opened = Metrics(tmp_path, log, {}, images=0, wandb_id="")
    for images in (10, 20):
        opened.log({"images": images, "loss": 0.5})
    opened.log_picture(20, tmp_path / "none.png")
    opened.close()
    assert len(read_metrics(tmp_path)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        "Weights & Biases fails, and gets no more figures (RuntimeError: its process died)"
    )


def test_rows_that_were_changed_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = metrics(tmp_path)
    opened.log({"images": 10, "loss": 0.5})
    known = opened.sync()
    opened.log({"images": 20, "loss": 0.25})
    opened.close()

    def reopen() -> str:
        log = LogConfig(every_images=10, wandb="disabled")
        Metrics(tmp_path, log, {}, images=10, wandb_id="", rows_hash=known).close()
        return capsys.readouterr().err

    assert reopen() == ""
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().replace("0.5", "0.7"))
    assert "rows up to 10 images were changed or lost" in reopen()
    for lose in (lambda: file.write_text(""), file.unlink):
        lose()
        assert "rows up to 10 images were changed or lost" in reopen()


def test_the_curves_are_drawn_from_whatever_rows_hold(tmp_path: Path) -> None:
    """A row with other keys is what one changed byte leaves."""
    rows = [{"images": 10, "loss": 0.5}, {"images": 20, "lost": 0.4}, {"images": 20}]
    for added in ([], [{"images": 20, "val_loss": 0.45}, {"images": 30, "val_loss": None}]):
        lines = [json.dumps(row) + "\n" for row in rows + added]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        plot_loss(tmp_path, tmp_path / f"{len(added)}.png")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "2.png").read_bytes()
