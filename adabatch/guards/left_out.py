"""A run whose updates are all left out trains nothing, and stops."""

from __future__ import annotations

EXIT_NO_UPDATES = 77
"""Exit status of a run that stopped since its updates were left out one after another."""


class UpdatesLeftOut(RuntimeError):
    """So many updates in a row were left out that the run trains nothing any more."""


class UpdatesInARow:
    """Counts the steps since the last update that was applied.

    Args:
        limit: how many may be left out in a row; None for any number.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"max_left_out must be at least 1 update in a row, or None for any number, got {limit}")
        self._limit = limit
        self._applied = -1
        self._since = 0

    def check(self, consumed: int, applied: int) -> None:
        """Before a step begins.

        Args:
            consumed: steps run so far.
            applied: those of them whose update was applied.

        Raises:
            UpdatesLeftOut: too many were left out since the last that was.
        """
        if applied != self._applied:
            self._applied, self._since = applied, consumed
        left_out = consumed - self._since
        if self._limit is not None and left_out >= self._limit:
            raise UpdatesLeftOut(
                f"the last {left_out} updates in a row were left out, up to step {consumed}, since loss or gradient "
                f"were not finite: the run trains nothing any more; go on from its last checkpoint with a smaller "
                f"learning rate or other data, or allow more with max_left_out="
            )
