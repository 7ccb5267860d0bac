"""The report in a real browser, without a network; the sweep's table and curves."""

import csv
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow_dist.evaluation.neighbours import NeighboursOf
from tarflow_dist.evaluation.report import plot_sweep, show_sweep, write_csv, write_report
from tarflow_dist.evaluation.sample_store import SampleStore

MAGENTA, ORANGE = (255, 0, 255), (255, 128, 0)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def a_result(guidance: float, denoise: bool, distance: float) -> dict[str, Any]:
    return {
        "frechet_distance": distance,
        "frechet_distance_error": 0.25,
        "frechet_distance_bias": 0.5,
        "spatial_frechet_distance": 7.0,
        "inception_score": 10 + guidance,
        "inception_score_std": 0.5,
        "precision": 0.75,
        "recall": None,
        "kernel_distance": None,
        "kernel_distance_std": None,
        "not_measured": {"recall": "too few images"},
        "warnings": ["8 samples for 2,048 features: take more <b>of them</b>"],
        "features": "inception-v3-2048",
        "model": "models/<script>alert(1)</script>",
        "reference": "shards/in64",
        "reference_split": "train",
        "reference_images": 1000,
        "num_samples": 8,
        "redrawn_samples": 3,
        "guidance": guidance,
        "annealed": True,
        "denoise": denoise,
        "samples_sha256": f"{guidance}{denoise}",
        "command": "python -m tarflow_dist.sample_fid --model 'a & b'",
        "seconds": {"sampling": 12.3},
        "environment": {"torch": "2.15", "commit": None},
    }


RESULTS = [
    a_result(0.0, False, 9.0),
    a_result(0.0, True, 8.0),
    a_result(1.5, False, 4.0),
    a_result(1.5, True, 3.0),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    store = SampleStore(folder, {"num_samples": 8, "chunk_size": 8})
    store.begin()
    store.write_chunk(0, np.full((8, 32, 32, 3), MAGENTA, np.uint8), np.arange(8) % 2)
    neighbour = NeighboursOf(
        0,
        np.full((32, 32, 3), MAGENTA, np.uint8),
        np.full((6, 32, 32, 3), ORANGE, np.uint8),
        [1.25, 2, 3, 4, 5, 6],
    )
    plot_sweep(RESULTS, folder / "sweep.png")
    write_report(
        folder / "report.html",
        RESULTS,
        3,
        drawn=store,
        class_names=["tench, Tinca tinca", "goldfish"],
        neighbours=[neighbour],
        sweep_plot=folder / "sweep.png",
    )
    return folder / "report.html"


class Links(HTMLParser):
    """All addresses in the page, and the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_needs_nothing_but_itself(report: Path) -> None:
    page = report.read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) >= 5
    assert all(link.startswith("data:") for link in links.found)
    assert "script" not in links.tags
    assert not re.search(r"@import|url\(", page)


def browse(page: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={out}/profile"),
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium)")


@needs_browser
def test_a_browser_shows_the_pictures(report: Path, tmp_path: Path) -> None:
    """Samples are magenta, neighbours orange; a picture that a browser can't load has no colour."""
    shot = tmp_path / "shot.png"
    browse(report, tmp_path, f"--screenshot={shot}", "--window-size=1100,2600")
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)

    def count(colour: tuple[int, int, int]) -> int:
        return int((pixels == colour).all(axis=1).sum())

    assert count(MAGENTA) == (8 + 1) * 64 * 64
    assert count(ORANGE) == 6 * 64 * 64
    blue = (31, 119, 180)  # the plot's first curve
    assert (np.abs(pixels.astype(int) - blue).max(axis=1) < 10).sum() > 100
    assert 0.5 < (pixels == 255).all(axis=1).mean() < 0.95


@needs_browser
def test_a_browser_shows_the_words(report: Path, tmp_path: Path) -> None:
    page = browse(report, tmp_path, "--dump-dom").stdout
    for words in (
        "models/&lt;script&gt;alert(1)&lt;/script&gt;",
        "8 samples at guidance 1.5 annealed, denoised: the best of 4",
        "3 ± 0.25",
        "would be at about 2.5",
        "8 samples for 2,048 features: take more &lt;b&gt;of them&lt;/b&gt;.",
        "too few images",
        "3 of the 8 had to be drawn again",
        ">tench, Tinca tinca<",
        ">goldfish<",
        "distances 1.25, 2, 3, 4, 5, 6<",
        "--model 'a &amp; b'",
        "1.5True",
        "12.3 s",
    ):
        assert words in page


def test_the_table_of_a_sweep(tmp_path: Path) -> None:
    write_csv(RESULTS, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["guidance"], row["denoise"], row["frechet_distance"]) for row in rows] == [
        ("0.0", "False", "9.0"),
        ("0.0", "True", "8.0"),
        ("1.5", "False", "4.0"),
        ("1.5", "True", "3.0"),
    ]
    assert {row["recall"] for row in rows} == {""}


def test_the_table_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    show_sweep(RESULTS, 3)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["guidance", "denoising", "FID"]
    assert [" ".join(row.split()[:3]) for row in rows] == [
        "0 not denoised",
        "0 denoised 8",
        "1.5 not denoised",
        "1.5 denoised 3",
    ]
    assert [row.endswith("  best") for row in rows] == [False, False, False, True]


def test_the_curves_of_a_sweep(tmp_path: Path) -> None:
    """Distance, Inception Score and precision, and no panel for the recall that there isn't."""
    plot_sweep(RESULTS, tmp_path / "sweep.png")
    width, height = Image.open(tmp_path / "sweep.png").size
    assert width == pytest.approx(3 * 4.2 * 120, abs=2)
    assert height == pytest.approx(3.6 * 120, abs=2)
