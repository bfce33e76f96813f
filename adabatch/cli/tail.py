"""``adabatch tail``: the last steps of a run, and each new one when it is written to the journal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from adabatch.batch.control import Reason
from adabatch.cli.plain_parser import PlainParser
from adabatch.cli.runs import journal_in
from adabatch.journal.parts import parts_of
from adabatch.lr.journal_lines import LostLines

DESCRIPTION = """\
Follow a run: its last steps, one line each, and every new one, until Ctrl-C. Where the journal is cut by a run that
resumes, it is followed from there."""

# polling also works on the network file systems of clusters, which send no notice of a change made on another machine
POLL_SECONDS = 0.5
COLORS: Mapping[str, int] = MappingProxyType(
    {
        Reason.GROW: 32,
        Reason.SHRINK: 33,
        Reason.SCHEDULED: 34,
        Reason.AT_LIMIT: 35,
        Reason.NOT_FINITE: 31,
        Reason.WEIGHS_NOTHING: 31,
    }
)
"""ANSI colours of the reasons that change the batch, hold it, or are a failure."""


def run_tail(arguments: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; its exit status.

    Raises:
        ValueError: if there is no run, or the file is not a journal.
        OSError: if its journal cannot be read.
        KeyboardInterrupt: when the user ends it.
        SystemExit: with status 2, if there is a mistake on the command line.
    """
    asked = _parser().parse_args(arguments)
    journal = journal_in(asked.run)
    _check_journal(journal)
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lost = LostLines(str(journal))
    print(HEADER, flush=True)
    for entry in follow_journal(journal, lines=asked.lines, once=asked.once):
        lost.see(entry, f", step {entry['step']}" if "step" in entry else "")
        # flushed, so that a reader in a pipe sees each line at once
        print(line_text(entry, colored=colored), flush=True)
    return 0


def follow_journal(
    journal: Path, *, lines: int, once: bool, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Mapping[str, Any]]:
    """The last steps of a journal, then each new one when it is written; a line counts once it is complete.

    Args:
        journal: the file.
        lines: number of existing steps to yield.
        once: whether to stop after them.
        sleep: waits between two reads.
    """
    entries, place, begun, node = _last_of(journal, lines)
    yield from entries
    while not once:
        sleep(POLL_SECONDS)
        try:
            # Opened again each time: the file may have been cut, or another one may have its name.
            new, place, node, cut = _since(journal, place, node)
        except FileNotFoundError:
            continue  # between two files of a journal that is full
        *whole, begun = ((b"" if cut else begun) + new).split(b"\n")
        for text in whole:
            yield from _step(text)


def _check_journal(journal: Path) -> None:
    """Checks the first line, if there is one: another file would be followed for ever without a word."""
    with journal.open("rb") as file:
        text = file.readline()
    try:
        whole = not text.endswith(b"\n") or isinstance(json.loads(text), Mapping)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{journal} is not a journal: its first line is not a JSON object")


def _last_of(journal: Path, lines: int) -> tuple[list[Mapping[str, Any]], int, bytes, int]:
    """The last steps; the length of the newest file, the start of a line at its end, and its inode."""
    with journal.open("rb") as newest:
        entries, begun = _steps_of(newest, lines)
        # of the open file: by now its name may belong to another
        place, node = newest.tell(), os.fstat(newest.fileno()).st_ino
    for part in reversed(parts_of(journal)[:-1]):
        if len(entries) >= lines:
            break
        with part.open("rb") as file:
            entries = _steps_of(file, lines - len(entries))[0] + entries
    return entries, place, begun, node


def _steps_of(file: BinaryIO, lines: int) -> tuple[list[Mapping[str, Any]], bytes]:
    """The last steps of one file, and the start of an unfinished line at its end."""
    # a journal may be larger than memory, so no more than the last lines are held
    last: deque[Mapping[str, Any]] = deque(maxlen=lines)
    begun = b""
    for text in file:
        if text.endswith(b"\n"):
            last.extend(_step(text))
        else:
            begun = text
    return list(last), begun


def _since(journal: Path, place: int, node: int) -> tuple[bytes, int, int, bool]:
    """The bytes after ``place``; the new place and inode; and whether the journal was cut, so that the start of an
    unfinished line must be forgotten."""
    with journal.open("rb") as file:
        found = os.fstat(file.fileno())
        before = b""
        # a full file is renamed and a new one begins; the inode finds the old one, and what was not read of it is still
        # there
        if found.st_ino != node:
            parts = parts_of(journal)[:-1]
            aside = next((number for number, part in enumerate(parts) if part.stat().st_ino == node), None)
            if aside is None:
                return b"", found.st_size, found.st_ino, True
            before = b"".join(part.read_bytes()[place * (part == parts[aside]) :] for part in parts[aside:])
            place = 0
        # shorter than what was read of it: cut by a run that resumed
        if found.st_size < place:
            return b"", found.st_size, found.st_ino, True
        file.seek(place)
        return before + file.read(), file.tell(), found.st_ino, False


def _step(text: bytes) -> list[Mapping[str, Any]]:
    """The step or the evaluation on a line, in a list; an empty list if the line is neither."""
    try:
        entry = json.loads(text)
    except ValueError:
        return []
    known = isinstance(entry, Mapping) and any(isinstance(entry.get(key), Mapping) for key in ("plan", "evaluation"))
    return [entry] if known else []


COLUMNS = (("step", 9), ("examples", 13), ("batch", 8), ("wanted", 9), ("noise scale", 12), ("loss", 10), ("lr", 10))
HEADER = "".join(f"{name:>{width}}" for name, width in COLUMNS) + "  next"


def line_text(entry: Mapping[str, Any], *, colored: bool) -> str:
    """A step or an evaluation as one line.

    Args:
        entry: a line of the journal.
        colored: with ANSI colours.
    """
    if "evaluation" in entry:
        metrics = ", ".join(f"{name} {_short(value, 4)}" for name, value in entry["evaluation"].items())
        return f"{_whole(entry.get('step')):>9}{_whole(entry.get('examples')):>13}  evaluation: {metrics}"
    averages, lr = entry.get("averages") or {}, entry.get("lr") or {}
    applied = next(iter(lr.get("applied") or ()), None)
    values = (
        _whole(entry.get("step")),
        _whole(entry.get("examples")),
        _whole(entry["plan"].get("global_batch_size")),
        _whole(entry.get("wanted")),
        _short(averages.get("noise_scale"), 4),
        _short(entry.get("loss"), 4),
        _short(applied, 3),
    )
    cells = "".join(f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS, strict=True))
    reason = str(entry.get("reason") or "")
    said = f"{_whole(entry.get('next'))} {reason}".strip()
    # whatever the reason for the next plan is, this matters more, and has its colour
    if entry.get("applied") is False:
        said, reason = f"{said} (update left out)", Reason.NOT_FINITE
    color = COLORS.get(reason) if colored else None
    return f"{cells}  {said}" if color is None else f"{cells}  \x1b[{color}m{said}\x1b[0m"


def _whole(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _short(value: object, digits: int) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _parser() -> PlainParser:
    parser = PlainParser(prog="adabatch tail", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its journal")
    parser.add_argument("--lines", type=_count, default=10, metavar="N", help="steps that are there already (10)")
    parser.add_argument("--once", action="store_true", help="end with them")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


# argparse names the type in its error: "invalid number of lines value"
_count.__name__ = "number of lines"
