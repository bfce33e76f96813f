"""Stops a run whose updates are all left out, or made of numbers that are not finite, because it no longer trains."""

from __future__ import annotations

EXIT_NO_UPDATES = 77
"""Exit status of a run that stopped because too many updates in a row were left out."""


class UpdatesLeftOut(RuntimeError):
    """Too many updates in a row were left out, or made of numbers that are not finite: the run no longer trains."""


class UpdatesInARow:
    """Counts the steps since the last update that was applied, and since the last that was measured to be finite.

    Args:
        limit: how many updates may be left out in a row, at least 1; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._applied = -1
        self._since = 0
        self._first_bad: int | None = None  # the first measured step that was not finite, with none after it
        self._not_finite = 0  # steps from there to the last measured one

    def measured(self, step: int, *, finite: bool) -> None:
        """A step was measured whose update is made whatever its numbers are; or its numbers have come late.

        Args:
            step: its number.
            finite: whether its loss and gradient were finite.
        """
        if finite:
            self._first_bad, self._not_finite = None, 0
            return
        # A smaller number is that of a state that was loaded since.
        if self._first_bad is None or step < self._first_bad:
            self._first_bad = step
        self._not_finite = step + 1 - self._first_bad

    def check(self, consumed: int, applied: int) -> None:
        """Checks the count before a step begins.

        Args:
            consumed: number of steps so far.
            applied: number of those whose update was applied.

        Raises:
            UpdatesLeftOut: if too many were left out since the last one that was applied, or too many steps have passed
                in which nothing that was measured is finite.
        """
        # Compared, not incremented: after a load the counts may be smaller, and the stretch then begins at the loaded
        # step.
        if applied != self._applied:
            self._applied, self._since = applied, consumed
        left_out = consumed - self._since
        if self._limit is not None and left_out >= self._limit:
            raise UpdatesLeftOut(
                f"the last {left_out} updates in a row were left out, up to step {consumed}, because the loss or the "
                f"gradient was not finite: the run no longer trains. Resume from its last checkpoint with a smaller "
                f"learning rate or other data, or allow more with Guard(max_left_out=)"
            )
        if self._limit is not None and self._not_finite >= self._limit:
            raise UpdatesLeftOut(
                f"for {self._not_finite} steps, up to step {consumed}, no loss or gradient that was measured was "
                f"finite, and updates were made nevertheless (Guard(skip_nonfinite=) is not True): the run no longer "
                f"trains. Resume from its last checkpoint with a smaller learning rate or other data, or allow more "
                f"with Guard(max_left_out=)"
            )
