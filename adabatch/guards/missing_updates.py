"""Finds steps whose update never comes, and updates of a loop that does not go through ``steps()``."""

from __future__ import annotations

import warnings

STRANGE_UPDATES = 3
"""Number of updates after which a warning says that ``steps()`` was never called."""


class MissingUpdates:
    """Checks that each step is followed by its update, and that the loop uses ``steps()``.

    Args:
        kind: the optimizer's class, for messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._in_loop = False  # steps() has been called
        self._strange = 0  # updates before steps() was called
        self._missed = 0  # steps in a row without their update
        self._all_missed = 0  # steps without any update

    def begin_loop(self) -> None:
        """``steps()`` is called."""
        self._in_loop = True

    def strange(self) -> None:
        """An update outside of ``steps()``: either intended, or a sign that another framework runs the loop."""
        if self._in_loop:
            return
        self._strange += 1
        if self._strange == STRANGE_UPDATES:
            warnings.warn(
                f"an AdaptiveBatch was made for this {self._kind}, which has stepped {STRANGE_UPDATES} times, but "
                f"steps() of the AdaptiveBatch was never called, so neither batch nor learning rate change. Write the "
                f"loop as `for step in batches.steps(loader)`. A Trainer, or another framework with a loop of its own, "
                f"needs an integration",
                RuntimeWarning,
                stacklevel=2,
            )

    def came(self) -> None:
        """The update of a step came."""
        self._missed = 0

    def missed(self, parts: list[str], *, moved: bool) -> None:
        """A step is over without its update, and without a reason to leave it out. The second is reported.

        If no weight has moved, this is a warning and not an error, since a loop that only measures needs no update.

        Args:
            parts: the classes of the optimizers that did not step.
            moved: whether the weights changed nevertheless.

        Raises:
            RuntimeError: at the second such step in a row, if the weights changed, by an unknown optimizer or by only
                some of several.
        """
        missing = " and ".join(parts)
        wrong = moved or missing != self._kind
        self._missed += 1
        self._all_missed += not wrong
        if max(self._missed, self._all_missed) < 2:
            return
        often = f"{self._missed} steps in a row" if self._missed > 1 else f"{self._all_missed} steps"
        message = (
            f"the update never came for {often}: optimizer.step() of the {missing} was not called"
            f"{'' if missing == self._kind else f' (the optimizers are {self._kind})'}, so the learning rate's "
            f"progress stands still and the batch has no effect on it. Step the optimizer that AdaptiveBatch was "
            f"given, and not another one or one that was built later. If you use a GradScaler, give it to "
            f"AdaptiveBatch as engine=EngineOptions(scaler=...). If you leave an update out yourself, call leave_out() "
            f"of the AdaptiveBatch"
        )
        if wrong and self._missed > 1:
            raise RuntimeError(message)
        if not wrong and self._all_missed == 2:
            # Past PendingUpdates.end_step and the two generators, at the `for` over steps() of the user's loop.
            warnings.warn(message, RuntimeWarning, stacklevel=5)
