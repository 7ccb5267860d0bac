"""What a rank makes of the machine it finds itself on."""

import json
from pathlib import Path

import pytest
import ranks
from pretended_cuda import pretended_cuda

from tarflow_dist import distributed
from tarflow_dist.errors import UserError


def test_more_ranks_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pretended_cuda(), pytest.raises(UserError, match=r"2 ranks .* 1 GPU can be seen"):
        distributed.init()


def ask(out: Path) -> None:
    anyone = distributed.AnyRank(distributed.init())
    second = distributed.rank() == 1
    heard = []
    for flags in [(False, second, not second), (False, False, True), (False, False, False)]:
        anyone.ask(*flags)
        heard.append(anyone.answers())
    (out / f"{distributed.rank()}.json").write_text(json.dumps(heard))
    distributed.shutdown()


def test_every_rank_hears_what_any_of_them_says(tmp_path: Path) -> None:
    ranks.run(ask, tmp_path, ranks=2)
    heard = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert heard[0] == heard[1] == [[False, True, True], [False, False, True], [False] * 3]
