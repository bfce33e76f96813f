"""Who is lost, from what the ranks report: each case in a line."""

from __future__ import annotations

import json
import math
import threading

import pytest

from adabatch.batch.plan import BatchPlan
from adabatch.guards.heartbeat import Heartbeat, Position
from adabatch.guards.lost_ranks import Report, lost_ranks
from adabatch.runtime.observers.protocol import Moment, Phase

PLAN = BatchPlan(micro_batch_size=1, accumulation_steps=1, dp_size=1)


def at(moves: float, still: float = 0.0, *, silent: float = 0.0, between: bool = False, place: str = "here") -> Report:
    return Report(moves, place, between, still, silent)


LEFT = at(math.inf, 99)


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([at(5), at(5)], None),
        ([at(5), at(9)], None),  # slow, but on the move
        ([at(5, 9), at(9, 9)], None),
        ([at(5, 10, place="the loading"), at(9, 9)], "rank 0 has not moved for 10 s, in the loading"),
        ([at(9, 30), at(5, 10), at(5, 11)], "ranks 1, 2 have not moved for 10 s"),
        ([at(9, 30), at(5, 10), at(5, 1)], None),  # one of those that are behind moves: it waits for nobody
        ([at(5, 10), at(5, 10)], "no rank has moved for 10 s, all in here"),
        ([at(5, 10), at(5, 9)], None),
        ([at(5, 10, between=True), at(5, 10, between=True)], None),  # they test, or save
        ([at(5, 10, between=True), at(6, 10)], "rank 0 has not moved for 10 s"),
        ([LEFT, at(5, 1)], None),
        ([LEFT, at(5, 10, between=True)], "rank 1 has not moved for 10 s, in here, and rank 0 has left the loop: "),
        ([LEFT, at(5, 10), at(9, 10)], "rank 1 has not moved for 10 s, in here, and the other ranks wait for it"),
        ([LEFT, LEFT], None),
        ([at(5), at(9, silent=10, place="the forward")], "rank 1 has not been heard of for 10 s, last in the forward"),
        ([at(5), at(math.inf, silent=99)], None),
        ([at(5)], None),
    ],
)
def test_verdicts(reports: list[Report], expected: str | None) -> None:
    found = lost_ranks(dict(enumerate(reports)), timeout=10)
    assert (found or "").startswith(expected or "")
    assert (found is None) == (expected is None)


def test_a_report_travels_as_json() -> None:
    for report in (at(5, 1.5, silent=0.25, between=True), LEFT):
        assert Report(**json.loads(json.dumps(report._asdict()))) == report


def test_places_read_like_a_sentence() -> None:
    assert str(Position(Phase.BACKWARD, 17, 2)) == "the backward of micro-batch 2 of step 17"
    assert str(Position(Phase.MEASURING, 0)) == "the measuring of step 0"
    assert str(Heartbeat().place) == "the time before the first step"


def test_an_alarm_is_raised_at_the_next_mark() -> None:
    here = Heartbeat()
    here.at(Phase.LOADING, Moment(3, PLAN))
    thread = threading.Thread(target=lambda: setattr(here, "alarm", ValueError("lost")))
    thread.start()
    thread.join()
    with pytest.raises(ValueError, match="lost"):
        here.at(Phase.FORWARD, Moment(3, PLAN, 0))
    assert (here.moves, here.place) == (2, Position(Phase.FORWARD, 3, 0))
