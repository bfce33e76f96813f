"""When a run is saved: every so much training or time, on the word of the first rank, and before it ends."""

from __future__ import annotations

import time

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import require
from adabatch.batch.plan import Duration, Progress


class SaveTimes:
    """Says at the end of a step whether a checkpoint is due; the same on all ranks.

    Args:
        batches: say what was consumed, and carry the word of the first rank's clock; None where nothing is due by
            itself.
        every: save after so much training; needs ``batches``.
        every_seconds: save after so much time on the first rank; needs ``batches``.

    Raises:
        ValueError: an interval of no length or without ``batches``.
        TypeError: an interval without a unit.
    """

    def __init__(self, batches: AdaptiveBatch | None, *, every: Duration | None, every_seconds: float | None) -> None:
        _check(batches, every, every_seconds)
        self._batches = batches
        self._every = every
        self._every_seconds = every_seconds
        self._saved: Progress | None = None  # what was consumed when the run was last saved or loaded
        self._counted_from = Progress() if batches is None else batches.consumed
        self._saved_at = time.monotonic()

    def listen(self, *, first: bool) -> None:
        """From now on the ranks hear, at each step, whether the first one's time is over.

        Args:
            first: whether this is that rank.
        """
        if self._batches is not None and self._every_seconds is not None:
            self._batches.votes.listen(self._overdue if first else None)

    def due(self, *, now: bool) -> bool:
        """Whether to save: where an interval is over, or ``now``, but no step twice.

        Raises:
            ValueError: without ``batches``.
        """
        if self._batches is None:
            raise ValueError("step() counts by the AdaptiveBatch: pass batches=, or call save() where it suits you")
        consumed, due = self._batches.consumed, now or self._batches.votes.save
        if self._every is not None:
            unit = self._every.unit
            due = due or consumed.count(unit) - self._counted_from.count(unit) >= self._every.count
        return due and consumed != self._saved

    def saved(self) -> None:
        """The run was saved as it is."""
        self._saved_at = time.monotonic()
        self.loaded()

    def loaded(self) -> None:
        """The run was put back to a checkpoint, and stands where that stood."""
        if self._batches is not None:
            self._saved = self._counted_from = self._batches.consumed

    def _overdue(self) -> bool:
        return self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds


def _check(batches: AdaptiveBatch | None, every: Duration | None, every_seconds: float | None) -> None:
    if every is not None:
        if not isinstance(every, Duration):
            raise TypeError(f"every must be a duration, such as adabatch.examples({every!r}), got {every!r}")
        require(every.count >= 1, "every must be 1 at least", every)
        if batches is not None:
            batches.consumed.count(every.unit)  # a unit that is not counted fails here
    require(every_seconds is None or every_seconds > 0, "every_seconds must be positive", every_seconds)
    if batches is None and (every is not None or every_seconds is not None):
        raise ValueError("every= and every_seconds= are counted by the AdaptiveBatch: pass batches= too")
