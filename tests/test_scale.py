"""What a training step sends on 512 ranks, counted by benchmarks.scale."""

import json
from pathlib import Path

import pytest
import ranks

WORLD = 512
STAGES = [1, 2, 3]
# bytes a parameter that a node sends, with bf16 weights, by a reduce-scatter and an all-gather
WIRE = {"fp32": 4 + 2, "bf16": 2 + 2}
SLACK = 0.03  # padding, and the norm
cells = pytest.mark.parametrize(
    ("stage", "reduced"), [(s, reduced) for s in STAGES for reduced in WIRE]
)


def count(shards: Path, out: Path) -> None:
    from benchmarks.scale import join, measure_all
    from tarflow_dist.training import engine

    join(WORLD)
    engine.BUCKET = 200_000  # several of them
    small = "model.num_blocks=1"
    found = {
        reduced: measure_all(STAGES, ["bf16"], shards, [small, f"train.reduce_precision={reduced}"])
        for reduced in WIRE
    }
    out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def counted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict]:
    """By ZeRO stage and precision of the reduction."""
    out = tmp_path_factory.mktemp("scale") / "counts.json"
    ranks.run(count, digits / "mds", out)
    found = json.loads(out.read_text())
    return {(cell["stage"], reduced): cell for reduced in WIRE for cell in found[reduced]}


@cells
def test_a_step_sends_no_more_than_it_must(stage: int, reduced: str, counted: dict) -> None:
    step = counted[stage, reduced]["step"]
    assert step["wire"] == pytest.approx(WIRE[reduced], rel=SLACK)
    if stage < 3:  # as many messages as buckets, and the norm, and what is asked of all ranks
        kinds = {kind.split()[0]: number for kind, number in step["calls"].items()}
        assert kinds["reduce_scatter"] == kinds["all_gather"] > 2
        assert kinds["all_reduce"] == 2


@cells
def test_a_checkpoint_is_written_and_read_where_it_is_held(
    stage: int, reduced: str, counted: dict
) -> None:
    cell = counted[stage, reduced]
    assert (cell["save"]["calls"], cell["save"]["wire"]) == ({}, 0)
    assert cell["read"] < 1.2 * 16 / WORLD  # padding, and buffers
    weights = 2 if stage < 3 else 1  # in bf16; at ZeRO 3 those of small tensors alone
    assert cell["resume"]["wire"] <= weights * (1 + SLACK)


@cells
def test_nothing_in_a_step_goes_through_the_host(stage: int, reduced: str, counted: dict) -> None:
    assert counted[stage, reduced]["step"]["host_calls"] == 0
    assert counted[stage, reduced]["log"]["host_calls"] > 0  # which is how a row is written
