"""Two ranks that differ in one setting: both say which, with both values, before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.settings import DIFFERENCES, other_optimizers, said

pytestmark = pytest.mark.distributed


def test_ranks_that_differ_in_any_setting_say_so(tmp_path: Path) -> None:
    results = run_ranks(said, 2, tmp_path, timeout=120)
    for result in results:
        assert result[""] == "2"
        for case, (_, words) in DIFFERENCES.items():
            assert words in result[case], (case, result[case])
            told = result[case].startswith("ValueError: the ranks were given different settings: ")
            assert told or case == "limits refused on one rank", result[case]
    first, second = (result["limits refused on one rank"] for result in results)
    assert first.startswith("RuntimeError: AdaptiveBatch(...) failed on rank 1: ValueError: limits.min=9 cannot")
    assert second.startswith("ValueError: limits.min=9 cannot be shared")


def test_other_optimizers_are_named(tmp_path: Path) -> None:
    for error in run_ranks(other_optimizers, 2, tmp_path):
        assert "optimizer is 'AdamW' on rank 0 and 'SGD' on rank 1" in error
        assert "and " in error.split("; ")[-1]
