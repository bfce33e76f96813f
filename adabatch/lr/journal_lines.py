"""The lines of a run's journal, decoded and checked: for whatever reads a run afterwards. Pure: it opens no files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# not imported from `adabatch.journal`, which needs torch; a test holds the two together
JOURNAL_FORMAT = 1
"""The format of journal lines that is read here, which ``adabatch.journal`` writes."""

_log = logging.getLogger("adabatch")

JournalEntry = Mapping[str, Any]
"""A decoded line, or a part of one."""


def entries(lines: Iterable[str | JournalEntry], source: str) -> Iterator[tuple[int, JournalEntry]]:
    """The lines of one run with their numbers, from 1. The last is left out if it is unfinished.

    Args:
        lines: JSON texts, or what they hold. Empty lines are skipped.
        source: the name of the journal in errors.

    The first place at which lines are missing is a warning in the log.

    Raises:
        ValueError: if a line before the last is damaged, or if the journal has another format, two runs, or a step
            twice.
    """
    damaged, run, lost = "", _OneRun(source), LostLines(source)
    for number, line in enumerate(lines, 1):
        if isinstance(line, str) and not line.strip():
            continue
        if damaged:
            raise ValueError(damaged)
        try:
            entry = json.loads(line) if isinstance(line, str) else line
        except ValueError as error:
            # Raised at the next line only: the last line of a run that still writes, or was killed, may be incomplete.
            damaged = f"{source}, line {number}, is not JSON and not the last line: {error}"
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"{source}, line {number}, is not a JSON object: {str(line).strip():.80}")
        if entry.get("format", JOURNAL_FORMAT) != JOURNAL_FORMAT:
            raise ValueError(
                f"{source}, line {number}, has format {entry['format']!r}, this version of adabatch reads format "
                f"{JOURNAL_FORMAT}: use the version that wrote it"
            )
        run.see(number, entry)
        lost.see(entry, f", line {number}")
        yield number, entry


class LostLines:
    """Says in the log, once, that lines of a journal are missing: its steps follow each other without a gap.

    Args:
        source: the name of the journal.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._end: float | None = None
        self._said = False

    def see(self, entry: JournalEntry, where: str = "") -> None:
        """Compares a line with the one before it.

        Args:
            entry: the line.
            where: its place, for the message.
        """
        step = _step_of(entry)
        if step is None:
            return
        begins, size = step
        if self._end is not None and begins > self._end and not self._said:
            self._said = True
            _log.warning(
                "%s%s, begins at %s examples, and the line before ends at %s: the lines between them were removed or "
                "lost, and what is read from the journal leaves their steps out",
                self._source, where, f"{begins:,}", f"{self._end:,}",
            )  # fmt: skip
        self._end = begins + size


def _step_of(entry: JournalEntry) -> tuple[float, float] | None:
    """The examples before a step, and those of the step; None if the line is not of a step."""
    begins, size = entry.get("examples"), part_of(entry, "plan").get("global_batch_size")
    return (begins, size) if isinstance(begins, int | float) and isinstance(size, int | float) else None


class _OneRun:
    """Checks that lines belong to one run, and that no step is among them twice.

    A run that was resumed without the token of its checkpoint, because its state was saved by hand, must continue where
    the lines end.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._run: str | None = None
        self._begins = -math.inf
        self._end: float | None = None

    def see(self, number: int, entry: JournalEntry) -> None:
        step = _step_of(entry)
        if step is None:
            return
        begins, size = step
        run = entry.get("run")
        if run is None:  # written by a release without tokens
            wrong = begins <= self._begins
        else:
            wrong = self._end is not None and begins != self._end and (begins < self._end or run != self._run)
        if wrong:
            other = run is not None and self._run is not None and run != self._run
            what = f"begins another run ({run} after {self._run})" if other else "begins again"
            raise ValueError(
                f"{self._source}, line {number}, {what} at {begins:,} examples, where the lines before end at "
                f"{self._end or 0:,}: give one run at a time, in a copy of the journal that holds its lines only"
            )
        self._run, self._begins, self._end = run, begins, begins + size


def part_of(entry: JournalEntry, key: str) -> JournalEntry:
    """A part of a line, such as its plan; empty if the line has none."""
    value = entry.get(key)
    return value if isinstance(value, Mapping) else {}


def number_of(entry: JournalEntry, key: str) -> float:
    """A number of a line; NaN if it has none, or null, which is written for numbers that are not finite."""
    return finite_number(entry.get(key))


def numbers_of(entry: JournalEntry, key: str) -> list[float]:
    """The numbers of a list, such as one per parameter group; empty if there is none."""
    values = entry.get(key)
    return [finite_number(value) for value in values] if isinstance(values, list) else []


def finite_number(value: object) -> float:
    """The value if it is a finite number, else NaN."""
    # True is an int in Python
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
