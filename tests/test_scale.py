"""Planners and data orders of many ranks in one process: they agree, deal each example once, and resume with fewer."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("size", [8, 100])
def test_many_ranks_stay_together_through_a_death_and_a_drift(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scale = importlib.import_module("scale")
    run = scale.simulate(size, 10)
    assert (run.agreed, run.dealt_once, run.resumed, run.drift_found) == (10, True, True, True)
    assert max(run.sizes) > run.sizes[0], "the batch grows in it, or nothing was decided"
    assert run.slowdown > 1


def test_the_tree_of_the_watchdog_is_three_links_deep_at_ten_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scale = importlib.import_module("scale")
    assert [scale.tree_cost(ranks).depth for ranks in (1, 2, 65, 66, 4161, 10_000)] == [0, 1, 1, 2, 2, 3]
    assert scale.tree_cost(10_000).connections == 65


def test_the_order_takes_no_more_memory_for_more_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scale = importlib.import_module("scale")
    costs = scale.order_costs()
    assert max(cost.kibibytes for cost in costs) < 64  # a permutation of 10^6 in memory has 7,813
