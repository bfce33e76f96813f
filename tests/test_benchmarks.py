"""That benchmarks run: their contenders on tiny tasks, which must agree before they are timed."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("task", ["tiny-cnn", "tiny-transformer"])
def test_exact_tests_and_their_rivals_agree(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-example gradients by torch.func, at once and in chunks, and Opacus where it is installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    exact_tests = importlib.import_module("exact_tests")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus uses hooks that torch warns of
        timings = exact_tests.interleave(partial(exact_tests.steps_of, task), trials=1, rounds=2, warmup=0)
        assert exact_tests.peak_of(task, exact_tests.NORMS) > 0
    assert {exact_tests.PLAIN, *exact_tests.GOALS} < timings.seconds.keys()
    assert all(len(seconds) == 2 for seconds in timings.seconds.values())
