"""Stops a run whose updates are all left out, because it no longer trains."""

from __future__ import annotations

EXIT_NO_UPDATES = 77
"""Exit status of a run that stopped because too many updates in a row were left out."""


class UpdatesLeftOut(RuntimeError):
    """Too many updates in a row were left out: the run no longer trains."""


class UpdatesInARow:
    """Counts the steps since the last update that was applied.

    Args:
        limit: how many updates may be left out in a row; None for no limit.

    Raises:
        ValueError: if the limit is below 1.
    """

    def __init__(self, limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"max_left_out must be at least 1 update in a row, or None for any number, got {limit}")
        self._limit = limit
        self._applied = -1
        self._since = 0

    def check(self, consumed: int, applied: int) -> None:
        """Checks the count before a step begins.

        Args:
            consumed: number of steps so far.
            applied: number of those whose update was applied.

        Raises:
            UpdatesLeftOut: if too many were left out since the last one that was applied.
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
