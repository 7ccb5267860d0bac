"""What a rank makes of the machine it finds itself on."""

import pytest
from pretended_cuda import pretended_cuda

from tarflow_dist import distributed
from tarflow_dist.errors import UserError


def test_more_ranks_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pretended_cuda(), pytest.raises(UserError, match=r"2 ranks .* 1 GPU can be seen"):
        distributed.init()
