"""benchmarks.gpu, in small on the CPU: so that it runs when there is a card for once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from benchmarks.gpu import page
from benchmarks.gpu.__main__ import SECTIONS, share_of
from benchmarks.gpu.models import Problem, attempt, problems


@pytest.mark.e2e
def test_all_of_it_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--budget", "3000"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--tiny"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == list(SECTIONS)
    assert [line for line in lines if not line["ok"]] == []
    assert done.returncode == 0
    assert all(line["device"].startswith("cpu") for line in lines)
    golden = lines[0]["found"]
    assert len(golden) == 6
    assert all(found["within"] for found in golden.values())
    assert "".join(page.section(lines)) == page.NOTHING


@pytest.mark.parametrize("taken", [1.0, 0.6, 0.0])
def test_sections_stay_in_the_budget_and_leave_what_they_do_not_take(taken: float) -> None:
    left, names = 480.0, list(SECTIONS)
    for place, name in enumerate(names):
        limit = share_of(names[place:], left)
        assert limit == pytest.approx(max(limit, SECTIONS[name][1]))
        left -= taken * limit
    assert left == pytest.approx(0) or taken < 1
    assert share_of(["golden"], 100) == 100


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--only", "golden"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert done.returncode == 1
    assert "there is no GPU here" in line["error"]


def test_the_page_says_what_was_measured_and_what_failed() -> None:
    def line(section: str, device: str, speed: float, **more: object) -> dict:
        found = {"in64": {"images/s": speed}} if speed else {}
        about = {"section": section, "device": device, "ok": True, "tiny": False, "day": "a day"}
        return {**about, "found": found, **more}

    lines = [
        line("a", "NVIDIA X", 12.5),
        line("b", "NVIDIA X", 3.5, ok=False, error="no time was left"),
        line("b", "NVIDIA X", 0, ok=False, error="there is no GPU here"),
        line("a", "NVIDIA Y", 99.5),
        line("a", "NVIDIA X", 77.5, tiny=True),
        line("c", "cpu (AVX2)", 55.5),
    ]
    text = "\n".join(page.section(lines))
    first, second = text.split("On one NVIDIA Y, a day")
    assert first.startswith("On one NVIDIA X, a day")
    assert "| in64 | 12.5 |" in first
    assert "**b**: not whole, no time was left" in first
    assert "| in64 | 99.5 |" in second
    assert not any(wrong in text for wrong in ("77.5", "55.5", "no GPU here"))


def test_what_went_wrong_is_found_at_any_depth() -> None:
    assert problems({"a": {"within": True, "x": 0.5, "name": "text"}, "b": [1]}) == []
    found = {"a": {"within": False}, "b": attempt(lambda: 1 / 0), "c": {"d": Problem("bad")}}
    assert problems(found) == [
        "a: within: does not hold",
        "b: ZeroDivisionError: division by zero",
        "c: d: bad",
    ]
