"""What a training step sends on 512 ranks, counted by benchmarks.scale."""

import json
from pathlib import Path

import pytest
import ranks

WORLD = 512
STAGES = [1, 2, 3]
WIRE = {1: 10.0, 2: 10.0, 3: 6.0}
"""Bytes a parameter that a node sends in a step with bf16 weights and fp32 gradients."""


def count(shards: Path, out: Path) -> None:
    from benchmarks.scale import measure_all

    found = measure_all(WORLD, STAGES, ["bf16"], shards, ["model.num_blocks=1"])
    out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def counted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """By ZeRO stage."""
    out = tmp_path_factory.mktemp("scale") / "counts.json"
    ranks.run(count, digits / "mds", out)
    return {result["stage"]: result for result in json.loads(out.read_text())}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_sends_no_more(stage: int, counted: dict[int, dict]) -> None:
    assert counted[stage]["step"]["wire"] <= WIRE[stage] + 0.05
