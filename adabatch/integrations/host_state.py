"""The part of a run in a host's own checkpoint: the batches, the order of the data, and the place in the journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adabatch.adaptive import AdaptiveBatch
from adabatch.runtime.data import GlobalOrder


class HostState:
    """The state of a run for a host that saves and restores by ``state_dict`` and ``load_state_dict``.

    It consists of plain numbers that are equal on all ranks. When it is loaded, later lines of the journal are moved to
    a file beside it, whose name ends in ``.cut``.

    Args:
        batches: the batches of the run.
        order: the order whose place is saved too; None if the host saves the place of its own loader.
        scaled: whether a gradient scaler is used, which may skip an update.
    """

    def __init__(self, batches: AdaptiveBatch, *, order: GlobalOrder | None = None, scaled: bool = False) -> None:
        self.batches = batches
        self.order = order
        self._scaled = scaled

    def state_dict(self) -> dict[str, Any]:
        """The state of the next step.

        Raises:
            RuntimeError: if a step has not ended, or its update has not been made.
        """
        self.batches.settle(scaled=self._scaled)
        self.batches.journal.sync()  # a checkpoint must not be ahead of the journal on the disk
        state = {"batches": self.batches.state_dict(), "run": self.batches.journal.run}
        return state if self.order is None else {**state, "order": self.order.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state.

        Raises:
            ValueError: if the state has a newer format, or another reference batch size or order than this run.
        """
        self.batches.load_state_dict(state["batches"])
        if self.order is not None and "order" in state:
            self.order.load_state_dict(state["order"])
        self.batches.journal.run = state["run"]
        self.batches.journal.cut(self.batches.consumed.examples)
