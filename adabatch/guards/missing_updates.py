"""Updates that never come, and updates of a run whose loop is somebody else's."""

from __future__ import annotations

import warnings

STRANGE_UPDATES = 3
"""Updates of a run whose ``steps()`` was never called, after which it says so."""


class MissingUpdates:
    """Sees to it that each step is followed by its update, and that no loop goes past ``steps()``.

    Args:
        kind: what the optimizer is called in messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._in_loop = False  # steps() has been called
        self._strange = 0  # updates while it had not
        self._missed = 0  # steps in a row whose update never came

    def begin_loop(self) -> None:
        """``steps()`` is called."""
        self._in_loop = True

    def strange(self) -> None:
        """An update outside of ``steps()``: the loop's own, or a sign that the loop is somebody else's."""
        if self._in_loop:
            return
        self._strange += 1
        if self._strange == STRANGE_UPDATES:
            warnings.warn(
                f"an AdaptiveBatch was made for this {self._kind}, which has stepped {STRANGE_UPDATES} times, and "
                f"steps() of the AdaptiveBatch was never called: neither batch nor learning rate changes. Write the "
                f"loop as `for step in batches.steps(loader)`; a Trainer or another framework that has the loop itself "
                f"needs an integration for it",
                RuntimeWarning,
                stacklevel=2,
            )

    def came(self) -> None:
        """The update of a step came."""
        self._missed = 0

    def missed(self, parts: list[str]) -> None:
        """A step is over, and its update neither came nor was left out by somebody who may.

        Args:
            parts: the classes of the optimizers that did not step.

        Raises:
            RuntimeError: for the second such step in a row.
        """
        self._missed += 1
        if self._missed < 2:
            return
        missing = " and ".join(parts)
        raise RuntimeError(
            f"the update never came for {self._missed} steps in a row: optimizer.step() of the {missing} was not called"
            f"{'' if missing == self._kind else f' (the optimizers are {self._kind})'}, so the learning rate's progress "
            f"stands still and the batch has no effect on it. Step the optimizer that AdaptiveBatch was given, not "
            f"another or one that was built later; a GradScaler must be given to it too, as "
            f"engine=EngineOptions(scaler=...); where you leave an update out yourself, call leave_out() of the "
            f"AdaptiveBatch"
        )
