"""What a rank concludes from where the others stand, on a channel in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from adabatch.guards import rank_places
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.rank_places import RankPlaces
from adabatch.runtime.side_channel import SideChannel


class InMemory(SideChannel):
    """Rank 0 of two, whose partner has gone on to step 5; it had come to where rank 0 waits, or it had not."""

    def __init__(self, *, came: bool) -> None:
        super().__init__("test", 0, 2)
        self._came = came
        self._read = False

    def arrive(self, place: str) -> Callable[[], bool]:
        # rank 0 does not see its partner come until it has read where it stands
        return lambda: self._came and self._read

    def read(self, what: str) -> str | None:
        self._read = True
        return '[1, 5, "the backward of step 5"]' if what == "place of rank 1" else None

    def post(self, what: str, text: str) -> None:
        pass

    def add(self, what: str, number: int = 1) -> int:
        return self.size


@pytest.mark.parametrize("came", [True, False])
def test_a_rank_that_went_on_after_all_had_come_is_none_that_stays_away(
    came: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_places, "_PERIOD", 0.0)
    places = RankPlaces(InMemory(came=came), Heartbeat())
    gone_on = pytest.raises(RuntimeError, match="rank 1 has gone on to the backward of step 5: call it on every rank")
    with nullcontext() if came else gone_on:
        places.wait_for_all("save()")
