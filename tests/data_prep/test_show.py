"""`python -m data_prep show`: the summary as a table, and a contact sheet."""

from pathlib import Path

import numpy as np
import pytest
from commands import run
from PIL import Image

from data_prep.__main__ import main
from data_prep.prepare import prepare
from data_prep.settings import Settings
from data_prep.show import CELL, COLUMNS
from data_prep.sources import open_source
from tarflow_dist.errors import UserError
from tarflow_dist.telemetry.pictures import GUTTER, NAME_WIDTH

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Three classes of six pictures, each class in a colour of its own."""
    for number, colour in enumerate(COLOURS):
        for image in range(6):
            file = tmp_path / "src" / f"class-{number}" / f"{image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), colour).save(file)
    source = open_source(tmp_path / "src", layout="folder", val_fraction=0.2, seed=0)
    prepare(source, tmp_path / "out", ["mds", "wds"], Settings(size=16, encode="raw"))
    return tmp_path / "out"


@pytest.mark.parametrize("form", ["", "mds", "wds"])
def test_table_and_pictures(out: Path, form: str) -> None:
    table = run("data_prep", "show", out / form).stdout.splitlines()
    values = {line[:14].strip(): line[14:] for line in table}
    assert values["images"] == "15 train, 3 val"
    assert values["classes"] == "3: class-0, class-1, class-2"
    assert values["in train"] == "5 to 5 a class"
    assert values["pixels"] == "16x16, RGB"
    assert values["stored"] == "0.0 MB of raw, 0.8 kB an image"
    assert values["set aside"] == "0 that could not be read"
    assert values["pictures"] == str(out / form / "contact-sheet.png")

    with Image.open(out / form / "contact-sheet.png") as image:
        sheet = np.asarray(image)
    step = CELL + GUTTER
    assert sheet.shape == (3 * step, NAME_WIDTH + COLUMNS * step, 3)
    for row, colour in enumerate(COLOURS):
        for column in range(COLUMNS):
            cell = sheet[row * step :, NAME_WIDTH + column * step :][:CELL, :CELL]
            expected = colour if column < 6 else (255, 255, 255)  # six of a class, 16 x 6 pixels
            assert (cell == expected).all()
        assert (sheet[row * step :, :NAME_WIDTH][:step] < 128).any()  # a name


def test_what_the_machine_refuses_is_a_sentence(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sheet = tmp_path / "file" / "sheet.png"
    with pytest.raises(UserError, match=f"can't write {sheet} .*: choose another place with --sh"):
        main(["show", str(out), "--sheet", str(sheet)])
    for command in ("show", "verify"):
        with pytest.raises(UserError, match="is in an object store: copy it to a disk"):
            main([command, "s3://b/x"])


def test_a_damaged_set_is_a_sentence(out: Path) -> None:
    (out / "mds" / "summary.json").write_text("{}")
    done = run("data_prep", "show", out, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out}/mds is damaged (the summary's ")
    assert "data_prep verify" in done.stderr
