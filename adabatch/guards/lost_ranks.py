"""Which ranks are lost: turns what the ranks report into a sentence, or into None if all is well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class RankLost(RuntimeError):
    """Another rank died, hangs or raised an error. The message says which one, in which phase, and what is known about
    it."""


class Report(NamedTuple):
    """The last report of a rank.

    Args:
        moves: number of phases that it has entered; infinite once it has left, so that the others are behind it.
        place: the phase that it is in, in words.
        between: whether it is between two steps.
        still: seconds since its last move.
        silent: seconds since its last report.
    """

    moves: float
    place: str
    between: bool
    still: float
    silent: float = 0.0

    @property
    def left(self) -> bool:
        """Whether it has reached the end, and waits there for the others."""
        return self.moves == math.inf


def lost_ranks(reports: Mapping[int, Report], *, timeout: float) -> str | None:
    """What is wrong with the run, in words; None if all is well.

    A rank is lost if it has not reported for ``timeout`` seconds. It hangs if it has not moved for that long while
    another rank is ahead of it and waits. If no rank has moved for that long in the middle of a step, one of them
    hangs, and the reports do not tell which.

    Args:
        reports: of all ranks that are connected, by rank.
        timeout: in seconds.
    """
    # Silence first: the other numbers of a rank that is gone are old.
    gone = [rank for rank, report in reports.items() if not report.left and report.silent >= timeout]
    if gone:
        return (
            f"{_ranks(gone)} {_has(gone)} not been heard of for {timeout:g} s, last in {reports[gone[0]].place}: "
            f"the process or its machine is gone or frozen"
        )
    here = {rank: report for rank, report in reports.items() if not report.left}
    if not here or (min(report.still for report in here.values()) < timeout and not _some_wait(reports)):
        return None
    last = min(report.moves for report in here.values())
    behind = [rank for rank, report in here.items() if report.moves == last]
    # the slowest have moved lately, so they are slow, not stuck
    if any(reports[rank].still < timeout for rank in behind):
        return None
    place = reports[behind[0]].place
    left = [rank for rank, report in reports.items() if report.left]
    if left and len(left) + len(behind) == len(reports):
        return (
            f"{_ranks(behind)} {_has(behind)} not moved for {timeout:g} s, in {place}, and {_ranks(left)} {_has(left)} "
            f"left the loop: they hang, or wait for what all ranks must do (a break or another number of steps on "
            f"{_ranks(left)})"
        )
    if _some_wait(reports):
        return (
            f"{_ranks(behind)} {_has(behind)} not moved for {timeout:g} s, in {place}, and the other ranks wait for it"
        )
    # between two steps a run may take any time, to test or to save
    if reports[behind[0]].between:
        return None
    return f"no rank has moved for {timeout:g} s, all in {place}: one of them hangs, and the others wait for it"


def _some_wait(reports: Mapping[int, Report]) -> bool:
    return len({report.moves for report in reports.values()}) > 1


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _has(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
