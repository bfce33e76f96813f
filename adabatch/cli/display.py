"""What a person sees while a job runs: one live line in a terminal, plain lines in a log; and tables."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from adabatch.batch.plan import Duration

LOG_PARTS = 10
"""Lines that a run leaves in a log that is not a terminal."""

LOG_WIDTH = 100
REDRAW_SECONDS = 0.1


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


class PlainConsole(Console):
    """A console that takes every text as it is, and outlives its reader.

    Names and paths of a user's own may hold brackets, which are not rich's markup. A reader that is gone (``| head``)
    is noted in ``unread``, where rich would end the process: a run has to save itself first. What is written after
    that goes nowhere.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)
        self.unread = False

    def on_broken_pipe(self) -> None:
        """Called by rich in place of a BrokenPipeError."""
        self.unread = True
        self.quiet = True
        with suppress(OSError, ValueError):  # a stream that is not a file has nothing to stumble over at the end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


class Shown:
    """One run's line. Silent on all ranks but the first."""

    def __init__(self, console: Console | None, bar: Progress | None, task: TaskID | None, label: str, total: Duration):
        self._console = console
        self._bar = bar
        self._task = task
        self._label = label
        self._total = total
        self._next_line = 0.0
        self._drawn = -math.inf

    def update(self, done: float, *, loss: float | None, global_batch_size: int, lr: float, noise_scale: float) -> None:
        """Shows where the run stands: ``done`` in the unit of its total."""
        if self._console is None:
            return
        text = (
            f"loss {_number(loss, 4)}  batch {global_batch_size:,}  lr {_number(lr)}  "
            f"noise scale {_number(noise_scale)}"
        )
        if self._bar is not None and self._task is not None:
            now = time.monotonic()
            if now - self._drawn > REDRAW_SECONDS or done >= self._total.count:
                self._drawn = now
                self._bar.update(self._task, completed=min(done, self._total.count), state=text)
        elif done >= self._next_line:
            self._next_line = done + self._total.count / LOG_PARTS
            self._console.print(f"{self._label}: {done:,.0f} of {self._total}  {text}", highlight=False, soft_wrap=True)


def _console() -> Console:
    """Standard output; a log has no width, and a table that is cut off there is of no use."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=LOG_WIDTH)


class Display:
    """Progress and tables for the first rank; nothing for the others.

    Args:
        rank: of this process.
        console: where to write; standard output by default.
    """

    def __init__(self, rank: int, console: Console | None = None) -> None:
        self._console = (console or _console()) if rank == 0 else None

    @property
    def unread(self) -> bool:
        """Whether the reader of standard output is gone, on the first rank."""
        return isinstance(self._console, PlainConsole) and self._console.unread

    def check_read(self) -> None:
        """At the end of a command that has nothing to save.

        Raises:
            BrokenPipeError: the reader of standard output is gone.
        """
        if self.unread:
            raise BrokenPipeError

    @contextmanager
    def progress(self, label: str, total: Duration) -> Iterator[Shown]:
        """A line for one run, for the time of the block."""
        console = self._console
        if console is None or not console.is_terminal:
            yield Shown(console, None, None, label, total)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + total.unit, markup=False),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as bar:
            yield Shown(console, bar, bar.add_task(label, total=total.count, state=""), label, total)

    def say(self, text: str) -> None:
        """One line of text."""
        if self._console is not None:
            self._console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line of text on standard error, for what concerns the run's end rather than its results."""
        if self._console is not None:
            with suppress(OSError):  # nobody may be reading that either
                print(text, file=sys.stderr, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers."""
        if self._console is None:
            return
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(header):
            # The header may wrap at its spaces; the values stay whole.
            width = max(len(word) for word in (*name.split(), *(row[index] for row in rows)))
            table.add_column(name, justify="left" if index == 0 else "right", min_width=width)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
