"""What a host's own checkpoint holds of a run: the batches, the order of the data, and the place in the journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adabatch.adaptive import AdaptiveBatch
from adabatch.runtime.data import GlobalOrder


class HostState:
    """The state of a run for a host that saves and restores by ``state_dict`` and ``load_state_dict``.

    Only plain numbers, equal on all ranks. Lines that the journal holds beyond the place that is loaded are moved to a
    file beside it, whose name ends in ``.cut``.

    Args:
        batches: of the run.
        order: whose place is saved too; None if the host saves that of its own loader.
        scaled: whether a gradient scaler is in use, which may leave an update out.
    """

    def __init__(self, batches: AdaptiveBatch, *, order: GlobalOrder | None = None, scaled: bool = False) -> None:
        self.batches = batches
        self.order = order
        self._scaled = scaled

    def state_dict(self) -> dict[str, Any]:
        """The state of the next step.

        Raises:
            RuntimeError: if a step is under way, or its update has not been made.
        """
        self.batches.settle(scaled=self._scaled)
        self.batches.journal.sync()  # no checkpoint may know of steps that the journal can still lose
        state = {"batches": self.batches.state_dict(), "run": self.batches.journal.run}
        return state if self.order is None else {**state, "order": self.order.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place.

        Raises:
            ValueError: if the state has a newer format, another reference batch size or another order than this run.
        """
        self.batches.load_state_dict(state["batches"])
        if self.order is not None and "order" in state:
            self.order.load_state_dict(state["order"])
        self.batches.journal.run = state["run"]
        self.batches.journal.cut(self.batches.consumed.examples)
