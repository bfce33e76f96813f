"""Which ranks are named when some have drifted."""

from __future__ import annotations

import pytest

from adabatch.guards.drift import _apart


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([1, 1, 2], "rank 2 holds other weights than ranks 0, 1"),
        ([5, 1, 1, 1, 7], "ranks 0, 4 hold other weights than ranks 1, 2, 3"),
        ([1, 2], "ranks 0 and 1 hold different weights, and there is no majority"),
        ([1, 1, 2, 2], "ranks 0, 1 and 2, 3 hold different weights, and there is no majority"),
    ],
)
def test_those_who_differ_from_most_are_named(held: list[float], words: str) -> None:
    assert _apart(dict(enumerate(held)), "weights").startswith(words)
