"""Writing beside the training: one thread at a time, and what went wrong in it."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
