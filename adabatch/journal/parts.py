"""The files of a journal: the one that is being written, and those that were full before it.

A line is about a kilobyte, so a run of a million steps writes a gigabyte. A file that has reached ``PART_BYTES`` is
renamed to ``NAME.1``, the next to ``NAME.2`` and so on, and the run continues in an empty ``NAME``. Readers take all of
them, the oldest first. A resume looks at the newest only, so that its time does not grow with the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PART_BYTES = 2**28
"""Size from which a file is full. Below it, some 250,000 steps, a journal is a single file."""

CUT = ".cut"

_TAIL = 1 << 20


def parts_of(path: Path) -> list[Path]:
    """The files of a journal, the oldest first; the last one is ``path`` itself, whether it is there or not."""
    numbered = _numbered(path)
    return [*(numbered[number] for number in sorted(numbered)), path]


def _numbered(path: Path) -> dict[int, Path]:
    begin = f"{path.name}."
    found = [each for each in path.parent.iterdir() if each.name.startswith(begin)]
    ends = [(each.name[len(begin) :], each) for each in found]
    # NAME.cut stands beside them
    return {int(end): each for end, each in ends if end.isdecimal()}


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a journal with their ends, from all of its files.

    Raises:
        OSError: if there is no journal.
    """
    for part in parts_of(path):
        # Undecodable bytes can only be the torn end of a file: they make its line no JSON.
        with part.open(encoding="utf-8", errors="replace") as file:
            yield from file


def rotate(path: Path) -> None:
    """Puts the file, which is full, among the older ones, and begins a new one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # a checkpoint makes sure of the newest file only
    path.rename(path.with_name(f"{path.name}.{max(_numbered(path), default=0) + 1}"))
    # A kill before this line leaves no NAME; the journal of the resumed run makes one when it is built.
    path.open("a", encoding="utf-8").close()


def last_token(path: Path) -> str | None:
    """The token of the run that wrote the last whole line; None if there is none, or a line without a token."""
    for part in reversed(parts_of(path)):
        with part.open("rb") as file:
            # A line is a few kilobytes; with many layers more.
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            for text in reversed(file.read().split(b"\n")):
                try:
                    run = json.loads(text)["run"]
                except (ValueError, LookupError, TypeError):
                    continue
                return run if isinstance(run, str) else None
    return None


class _Kept(NamedTuple):
    """What a cut leaves of a file: its first bytes, and how many examples their lines account for."""

    num_bytes: int
    reached: int


def cut(path: Path, num_examples: int) -> int:
    """Takes out the lines of steps that began at ``num_examples`` or later; see ``Journal.cut``.

    Files are emptied from the newest back, so that what a kill leaves is the journal of some step.
    """
    parts = parts_of(path)
    # from the newest back: a resume usually goes back by a few steps, so that the older files need not be read
    for place in range(len(parts) - 1, -1, -1):
        kept = _kept(parts[place], num_examples)
        if kept.num_bytes or place == 0:
            break
    # copied and synced before anything is cut, so that a kill in between loses no line
    _copy_aside(path, [(parts[place], kept.num_bytes), *((part, 0) for part in parts[place + 1 :])])
    for part in reversed(parts[place + 1 :]):
        # emptied rather than removed: the journal's own file is there at any moment
        if part == path:
            os.truncate(part, 0)
        else:
            part.unlink()
    os.truncate(parts[place], kept.num_bytes)
    parts[place].replace(path)
    return kept.reached


def _kept(part: Path, num_examples: int) -> _Kept:
    end, reached, damaged = 0, 0, ""
    with part.open("rb") as file:
        for number, text in enumerate(file if num_examples > 0 else (), 1):
            # A torn line is an error only if another one follows: a kill tears the last one.
            if damaged:
                raise ValueError(damaged)
            try:
                entry = json.loads(text)
                begins, evaluation = entry["examples"], "evaluation" in entry
                after = begins if evaluation else begins + entry["plan"]["global_batch_size"]
            except (ValueError, LookupError, TypeError) as error:
                damaged = f"{part}, line {number}, is not a line of a journal, and not the last one ({error})"
                continue
            late = begins > num_examples if evaluation else begins >= num_examples
            if late or not text.endswith(b"\n"):
                break
            end, reached = end + len(text), after
    return _Kept(end, reached)


def _copy_aside(path: Path, taken: list[tuple[Path, int]]) -> None:
    """Appends the files, each from the given byte on, to the file beside the journal."""
    # nothing to take out, so no empty file either
    if all(part.stat().st_size <= begin for part, begin in taken):
        return
    with path.with_name(path.name + CUT).open("ab") as aside:
        for part, begin in taken:
            with part.open("rb") as file:
                file.seek(begin)
                shutil.copyfileobj(file, aside)
                file.seek(max(begin, file.tell() - 1))
                # an unfinished line gets its end, or what the next cut appends would stand on the same line
                if file.read(1) not in (b"", b"\n"):
                    aside.write(b"\n")
        aside.flush()
        os.fsync(aside.fileno())
