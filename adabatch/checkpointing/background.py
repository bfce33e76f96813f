"""Writing beside the training: a copy of a state on the CPU, and one thread at a time that works on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def copied(state: Any) -> Any:
    """A state dict whose tensors are copies on the CPU, so that training may go on and change the originals.

    DTensors stay DTensors, of the same shards. What is neither a tensor nor a container of some is taken as it is.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [copied(value) for value in state] if isinstance(state, list) else tuple(copied(v) for v in state)
    return state


class Background:
    """Runs one task at a time in a thread, and keeps what went wrong until it is asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def run(self, task: Callable[[], None], *, name: str) -> None:
        """Begins a task; the one before must have been waited for."""
        assert self._thread is None, "one task at a time"
        # No daemon: an interpreter that ends lets it finish.
        self._thread = threading.Thread(target=self._run, args=(task,), name=name)
        self._thread.start()

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:  # whatever it is, it belongs to the thread that asked for the task
            self._failure = error

    def wait(self) -> Exception | None:
        """Until the task has ended; what it raised, said once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure
