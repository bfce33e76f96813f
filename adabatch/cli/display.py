"""Progress of a job, as one live line in a terminal or as plain lines in a log; and tables."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adabatch.batch.plan import Duration

LOG_PARTS = 10
"""Number of progress lines per run in a log that is not a terminal."""

LOG_WIDTH = 100
# As fast as one can read it; a small model makes a thousand steps in a second, and drawing each would slow it down.
REDRAW_SECONDS = 0.1

RATE_SECONDS = 20.0
"""Time over which the rate of a run is averaged, in seconds: the rate changes as the batch grows."""


class Pace:
    """The speed of a run, and the time that is left, from its progress over the last seconds.

    Args:
        total: its end, in the unit of ``done``.
    """

    def __init__(self, total: float) -> None:
        self._total = total
        self._seen: deque[tuple[float, float, float]] = deque()

    def add(self, now: float, done: float, examples: float) -> None:
        """Adds the progress of the run: the clock in seconds, the unit of the total, and examples."""
        self._seen.append((now, done, examples))
        # the second entry decides, so that what is kept spans at least RATE_SECONDS even when a step takes longer
        while len(self._seen) > 2 and now - self._seen[1][0] >= RATE_SECONDS:
            self._seen.popleft()

    def __str__(self) -> str:
        """Examples per second and the time that is left; empty before there are two steps."""
        if len(self._seen) < 2:
            return ""
        (began, was, before), (now, done, examples) = self._seen[0], self._seen[-1]
        seconds = now - began
        if seconds <= 0 or done <= was:
            return ""
        left = max(0.0, self._total - done) * seconds / (done - was)
        return f"{_number((examples - before) / seconds)} examples/s  {timedelta(seconds=round(left))} left"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


class PlainConsole(Console):
    """A console that prints every text unchanged, and survives the end of its reader.

    The user's names and paths may contain brackets, which must not be read as rich's markup. If the reader has ended
    (``| head``), rich would end the process; this class sets ``unread`` instead, because a run has to save itself
    first. Later output is dropped.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)
        self.unread = False

    def on_broken_pipe(self) -> None:
        """Called by rich instead of a BrokenPipeError."""
        self.unread = True
        self.quiet = True
        with suppress(OSError, ValueError):  # a stream that is not a file raises no error at the end of the process
            # else Python's own flush at exit fails again, with a traceback and status 120
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


class Shown:
    """One run's line. Silent on all ranks but the first.

    Args:
        console: where plain lines go; None for silence.
        draw: shows a count and a text in a live line; None without a live line.
        label: the run's name in plain lines.
        total: the length of the run.
        log_every: steps from one plain line to the next; by default there are ten lines in a run without a live line.
        clock: seconds.
    """

    def __init__(
        self,
        console: Console | None,
        draw: Callable[[float, str], None] | None,
        label: str,
        total: Duration,
        *,
        log_every: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._draw = draw
        self._label = label
        self._total = total
        self._log_every = log_every
        self._clock = clock
        self._pace = Pace(total.count)
        self._steps = 0
        self._next_line = 0.0
        self._drawn = -math.inf

    def update(
        self, done: float, *, examples: float, loss: float | None, global_batch_size: int, lr: float, noise_scale: float
    ) -> None:
        """Shows the progress of the run.

        Args:
            done: in the unit of the run's total.
            examples: consumed so far.
            loss: of the step.
            global_batch_size: of the step.
            lr: the learning rate of the next one.
            noise_scale: the average, in examples.
        """
        if self._console is None:
            return
        now = self._clock()
        self._steps += 1
        self._pace.add(now, done, examples)
        # the last step is always drawn, or the bar would stop before its end
        live = self._draw is not None and (now - self._drawn > REDRAW_SECONDS or done >= self._total.count)
        line = self._line_is_due(done)
        if not (live or line):
            return
        text = (
            f"loss {_number(loss, 4)}  batch {global_batch_size:,}  lr {_number(lr)}  "
            f"noise scale {_number(noise_scale)}  {self._pace}"
        ).rstrip()
        if live and self._draw is not None:
            self._drawn = now
            self._draw(min(done, self._total.count), text)
        if line:
            self._console.print(f"{self._label}: {done:,.0f} of {self._total}  {text}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line about the run, above a live line."""
        if self._console is not None:
            self._console.print(f"{self._label}: {text}", highlight=False, soft_wrap=True)

    def _line_is_due(self, done: float) -> bool:
        if self._log_every is not None:
            return self._steps % self._log_every == 0
        # by progress, not by steps, whose number nobody knows beforehand
        if self._draw is not None or done < self._next_line:
            return False
        self._next_line = done + self._total.count / LOG_PARTS
        return True


def output(*, width: int = LOG_WIDTH) -> Console:
    """Standard output; a log or a file gets a fixed width, so that tables are not cut off."""
    console = PlainConsole()
    # rich takes 80 columns if there is no terminal
    return console if console.is_terminal else PlainConsole(width=width)


def _notebook_line(label: str, total: Duration) -> Callable[[float, str], None]:
    """Draws a bar repeatedly into one output of a notebook's cell; rich's own bar needs widgets."""
    from IPython.display import display  # only notebooks call this, and they have IPython

    handle = display(  # type: ignore[no-untyped-call]
        {"text/plain": f"{label}: begins"}, raw=True, display_id=True
    )

    def draw(done: float, text: str) -> None:
        filled = round(20 * done / total.count)
        bar = "█" * filled + "░" * (20 - filled)
        handle.update({"text/plain": f"{label} {bar} {done:,.0f}/{total.count:,.0f} {total.unit}  {text}"}, raw=True)

    return draw


class Display:
    """Progress and tables for the first rank; nothing for the others.

    Args:
        rank: of this process.
        console: where to write; standard output by default.
        quiet: whether to show only results and errors, without progress.
        log_every: steps from one line of progress to the next, in a terminal in addition to the live line.

    Raises:
        ValueError: if ``log_every`` is below 1.
    """

    def __init__(
        self, rank: int, console: Console | None = None, *, quiet: bool = False, log_every: int | None = None
    ) -> None:
        if log_every is not None and log_every < 1:
            raise ValueError(f"log_every must be at least 1 step, or left out for ten lines per run, got {log_every}")
        self._console = (console or output()) if rank == 0 else None
        self._quiet = quiet
        self._log_every = log_every

    @property
    def unread(self) -> bool:
        """Whether the reader of standard output has ended, on the first rank."""
        return isinstance(self._console, PlainConsole) and self._console.unread

    def check_read(self) -> None:
        """At the end of a command that has nothing to save.

        Raises:
            BrokenPipeError: if the reader of standard output has ended.
        """
        if self.unread:
            raise BrokenPipeError

    @contextmanager
    def progress(self, label: str, total: Duration) -> Iterator[Shown]:
        """A progress line for one run, within the block."""
        console = None if self._quiet else self._console
        if console is None or not (console.is_terminal or console.is_jupyter):
            yield Shown(console, None, label, total, log_every=self._log_every)
            return
        if console.is_jupyter:
            yield Shown(console, _notebook_line(label, total), label, total, log_every=self._log_every)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + total.unit, markup=False),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total.count, state="")

            def draw(done: float, text: str) -> None:
                bar.update(task, completed=done, state=text)

            yield Shown(console, draw, label, total, log_every=self._log_every)

    def say(self, text: str) -> None:
        """One line of text."""
        if self._console is not None:
            # soft_wrap, so that a line stays one line in a log, and a path can be copied whole
            self._console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line of text on standard error, about the end of a run rather than its results."""
        if self._console is not None:
            with suppress(OSError):  # its reader may have ended too
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
