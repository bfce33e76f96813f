"""When a run is saved: at intervals of training or of time, which the first rank measures, and before it ends."""

from __future__ import annotations

import time
import warnings

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import level_of_the_user, require, shown
from adabatch.batch.plan import Duration, Progress


class SaveTimes:
    """Says at the end of a step whether a checkpoint is due; the same on all ranks.

    Args:
        batches: count what was consumed, and carry the votes of the first rank's clock; None if there is no interval.
        every: length of training from one checkpoint to the next; needs ``batches``.
        every_seconds: time from one checkpoint to the next, on the first rank's clock; needs ``batches``.

    Raises:
        ValueError: if an interval has no length or is given without ``batches``.
        TypeError: if an interval has no unit.
    """

    def __init__(self, batches: AdaptiveBatch | None, *, every: Duration | None, every_seconds: float | None) -> None:
        _check(batches, every, every_seconds)
        self._batches = batches
        self._every = every
        self._every_seconds = every_seconds
        self._saved: Progress | None = None  # what was consumed when the run was last saved or loaded
        self._counted_from = Progress() if batches is None else batches.consumed
        self._saved_at = time.monotonic()
        self._asked = False

    def listen(self, *, first: bool) -> None:
        """Starts the votes by which the first rank announces, at each step, that its interval of time is over.

        Args:
            first: whether this is the first rank.
        """
        if self._batches is not None and self._every_seconds is not None:
            self._batches.votes.listen(self._overdue if first else None)

    def due(self, *, now: bool) -> bool:
        """Whether to save: if an interval is over, or ``now``, but no step twice.

        Raises:
            ValueError: if there are no ``batches``.
        """
        if self._batches is None:
            raise ValueError("step() counts by the AdaptiveBatch: pass batches=, or call save() where it suits you")
        self._asked = True
        consumed, due = self._batches.consumed, now or self._batches.votes.save
        if self._every is not None:
            unit = self._every.unit
            due = due or consumed.count(unit) - self._counted_from.count(unit) >= self._every.count
        # no step twice: `now`, at the end of a run, often follows the save of an interval, or a load
        return due and consumed != self._saved

    def warn_if_never_asked(self) -> None:
        """Warns of intervals that nobody asked about, so that what was trained since the last save is not saved."""
        given = self._every is not None or self._every_seconds is not None
        if given and not self._asked and self._batches is not None and self._batches.consumed != self._counted_from:
            warnings.warn(
                "every= or every_seconds= was given, but step() was never called, so that nothing was saved at these "
                "intervals: call step() of the Checkpoints after each optimizer.step()",
                RuntimeWarning,
                stacklevel=level_of_the_user(),
            )

    def saved(self) -> None:
        """The run was saved in its present state."""
        self._saved_at = time.monotonic()
        self.loaded()

    def loaded(self) -> None:
        """The run was restored from a checkpoint."""
        if self._batches is not None:
            self._saved = self._counted_from = self._batches.consumed

    def _overdue(self) -> bool:
        return self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds


def _check(batches: AdaptiveBatch | None, every: Duration | None, every_seconds: float | None) -> None:
    if every is not None:
        if not isinstance(every, Duration):
            raise TypeError(f"every must be a duration, such as adabatch.examples({shown(every)}), got {shown(every)}")
        require(every.count >= 1, "every must be at least 1", every)
        if batches is not None:
            batches.consumed.count(every.unit)  # raises an error for a unit that the run does not count
    require(every_seconds is None or every_seconds > 0, "every_seconds must be positive", every_seconds)
    if batches is None and (every is not None or every_seconds is not None):
        raise ValueError("every= and every_seconds= are counted by the AdaptiveBatch: pass batches= too")
