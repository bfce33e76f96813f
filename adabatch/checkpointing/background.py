"""Writing in a thread beside the training, and the errors of that thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one task at a time in a thread, and keeps its error until ``wait`` returns it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def run(self, task: Callable[[], None], *, name: str) -> None:
        """Starts a task; call ``wait`` for the previous one first."""
        assert self._thread is None, "one task at a time"
        # Not a daemon thread, so that an interpreter that ends lets it finish.
        self._thread = threading.Thread(target=self._run, args=(task,), name=name)
        self._thread.start()

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:  # any error must reach the thread that started the task
            self._failure = error

    def wait(self) -> Exception | None:
        """Waits until the task has ended; returns its error, and forgets it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        # forgotten, or every later save would raise it again
        failure, self._failure = self._failure, None
        return failure
