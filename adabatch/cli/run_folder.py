"""The folder of a run without ``--out``: that of the same config's unfinished run, or a new ``runs/<date>-<n>``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adabatch.checkpointing.lock import Holder, read_lock
from adabatch.cli.display import Display
from adabatch.cli.runs import BEGUN, CHECKPOINTS
from adabatch.cli.text_files import json_values, write_atomically
from adabatch.runtime.collectives import Collectives

RUNS = Path("runs")
LATEST = "latest"


def run_folder(
    settings: Mapping[str, Any] | None, ranks: Collectives, *, resume: bool, display: Display, runs: Path = RUNS
) -> Path:
    """The folder of a run, the same on all ranks; ``runs/latest`` is a link to it.

    The same command resumes its run: the newest folder is used again if it has the same settings, is unfinished, and no
    process is using it. Otherwise the run gets a new folder.

    Args:
        settings: of the job, in plain values; None for a run that is never resumed.
        ranks: all of them must call this; the first one decides.
        resume: whether an unfinished run may be resumed.
        display: shows which folder is used.
        runs: where the folders are.

    Raises:
        OSError: on the first rank, if no folder can be created.
    """
    # numbers rather than a name, because that is what a reduction can send
    date, number = 0, 0
    failure: OSError | None = None
    if ranks.rank == 0:
        try:
            date, number = _taken_again(settings, runs, display) if resume and settings is not None else (0, 0)
            if not number:
                date, number = _new(runs)
                _begin(runs / _name(date, number), settings)
            _link(runs, _name(date, number), display)
        except OSError as error:
            failure = error
    # the other ranks have zeros, so the sum is the first rank's answer; a failure is sent too, or they would wait
    # forever
    failed, date, number = map(int, ranks.sum_of(failure is not None, date, number))
    if failure is not None:
        raise failure
    if failed:
        raise OSError(f"the first rank could not make a folder in {runs.absolute()}")
    return runs / _name(date, number)


def mark_finished(folder: Path) -> None:
    """Marks a run's folder as finished, so that the same command begins another run."""
    begun = _read(folder)
    if begun is not None:
        _write(folder, {**begun, "finished": True})


def _name(date: int, number: int) -> str:
    return f"{date // 10_000:04d}-{date // 100 % 100:02d}-{date % 100:02d}-{number}"


def _numbers_of(name: str) -> tuple[int, int]:
    """Date and number in a folder's name; zeros for other names."""
    with suppress(ValueError):
        year, month, day, number = map(int, name.split("-"))
        date = year * 10_000 + month * 100 + day
        # 2026-1-2-3 can be read too, but is no name that `_name` gives
        if _name(date, number) == name:
            return date, number
    return 0, 0


def _taken_again(settings: Mapping[str, Any] | None, runs: Path, display: Display) -> tuple[int, int]:
    """Date and number of the run that the link points to, if it can be resumed; else zeros."""
    link = runs / LATEST
    if not link.is_symlink():
        return 0, 0
    # the last part only: `runs` may have been moved since
    folder = runs / Path(os.readlink(link)).name
    begun = _read(folder)
    if begun is None or begun.get("finished"):
        return 0, 0
    if begun.get("settings") != json_values(settings):
        display.say(f"{folder} is unfinished, but has other settings: this is a new run; --out={folder} continues it")
        return 0, 0
    holder = read_lock(folder / CHECKPOINTS).holder
    if holder is not None and holder.may_run(Holder.this()):
        display.say(f"{folder} is in use by {holder}: this is a new run")
        return 0, 0
    return _numbers_of(folder.name)


def _new(runs: Path) -> tuple[int, int]:
    """Creates the next folder of today; two runs that begin at once get different folders."""
    runs.mkdir(parents=True, exist_ok=True)
    today = datetime.now(UTC).astimezone()
    date = today.year * 10_000 + today.month * 100 + today.day
    # above the largest, not the first that is free: folders that were removed must not change the order of the others
    number = max((n for d, n in map(_numbers_of, os.listdir(runs)) if d == date), default=0) + 1
    while True:
        try:
            (runs / _name(date, number)).mkdir()
        except FileExistsError:
            number += 1
        else:
            return date, number


def _link(runs: Path, name: str, display: Display) -> None:
    link = runs / LATEST
    if link.exists() and not link.is_symlink():
        display.say(f"{link} is a folder, not the link to the newest run: move it away, and the next run makes one")
        return
    new = runs / f".{LATEST}.{os.getpid()}"
    with suppress(FileNotFoundError):
        new.unlink()
    # a relative link, and replaced by a rename: `runs` may be moved, and a reader always finds a link
    new.symlink_to(name)
    new.replace(link)


def _begin(folder: Path, settings: Mapping[str, Any] | None) -> None:
    _write(folder, {"settings": json_values(settings), "finished": False})


def _write(folder: Path, begun: Mapping[str, Any]) -> None:
    write_atomically(folder / BEGUN, json.dumps(begun, indent=2) + "\n")


def _read(folder: Path) -> dict[str, Any] | None:
    """The settings that a run wrote when it began; None for a folder without them."""
    try:
        begun = json.loads((folder / BEGUN).read_bytes())
    except (OSError, ValueError):
        return None
    return begun if isinstance(begun, dict) else None
