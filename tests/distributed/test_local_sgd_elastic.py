"""Workers of local SGD that leave and join under torchrun's elastic agents, between two rounds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from support.elastic import three_two_three_two

pytestmark = pytest.mark.distributed


@pytest.mark.timeout(600)  # agents wait for each other's silence
def test_three_two_three_and_two_workers_go_on_at_the_ends_of_rounds(tmp_path: Path) -> None:
    """One is drained, one joins, one loses its power: no round is cut, and no example is left out or taken twice."""
    journal = three_two_three_two(tmp_path)
    worlds = [(size, list(steps)) for size, steps in itertools.groupby(journal, lambda line: line["plan"]["dp_size"])]
    # the last two are drained one after the other, so one of them may go on alone
    assert [size for size, _ in worlds][:4] == [3, 2, 3, 2]
    begin = 0
    for line in journal:
        assert line["examples"] == begin
        begin += line["plan"]["global_batch_size"]
    # rounds of four steps, one after the other, whoever takes them
    places = [(line["local_sgd"]["rounds"], line["local_sgd"]["step_in_round"]) for line in journal]
    assert places == [((step + 1) // 4, (step + 1) % 4) for step in range(len(journal))]
    for _, steps in worlds[:-1]:
        assert len(steps) % 4 == 0
