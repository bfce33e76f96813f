"""The contents of a run's folder: its journal, its config, and results beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from adabatch.checkpointing.files import MANIFEST, checkpoints_in
from adabatch.report.summary import flat

JOURNAL, CHECKPOINTS, BEGUN, COMPARISON = "journal.jsonl", "checkpoints", "run.json", "comparison.json"
VARIANTS = (".", "smallest", "largest")
"""Where ``adabatch compare`` keeps its three runs, in the order of its results."""


class FoundRun(NamedTuple):
    """A run that was given on the command line.

    Args:
        name: its name in reports.
        journal: its file.
        config: with dotted names; empty if there is none beside the journal.
        results: numbers beside it, such as the loss on a test set.
    """

    name: str
    journal: Path
    config: Mapping[str, Any]
    results: Mapping[str, float]


def find_runs(asked: list[str]) -> list[FoundRun]:
    """The runs of the command line: folders, journals, or either with a name before it (``wide=runs/a``).

    The folder of an ``adabatch compare`` stands for all of its runs.

    Raises:
        ValueError: if something is not one of these; says what a run is.
    """
    found: list[FoundRun] = []
    for text in asked:
        # A path may contain "=" itself, and then it is no name.
        name, equals, rest = text.partition("=")
        path = Path(text) if not equals or Path(text).exists() else Path(rest)
        given = name if equals and not Path(text).exists() else ""
        found += _compared(path, given) or [_run(path, given or _name_of(path))]
    # two runs of one name would be one column of a table and one entry of a legend
    counts = [run.name for run in found]
    return [run if counts.count(run.name) == 1 else run._replace(name=str(run.journal.parent)) for run in found]


def journal_in(path: Path) -> Path:
    """The journal of a run, from its folder or the file itself.

    Raises:
        ValueError: if it is neither.
    """
    journal = path / JOURNAL if path.is_dir() else path
    if not journal.is_file():
        raise ValueError(
            f"{path} has no journal: give the folder of a run of `adabatch train`, which holds {JOURNAL}, or such a "
            f"file"
        )
    return journal


def config_in(folder: Path) -> dict[str, Any]:
    """The config of a run with dotted names, from the file that it wrote when it began, or its newest readable
    checkpoint."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        # first: it holds the config from the first step on, even before there is a checkpoint
        begun = json.loads((folder / BEGUN).read_bytes())
        if begun.get("settings"):
            return flat(begun["settings"])
    for checkpoint in _checkpoints(folder / CHECKPOINTS):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            line = (checkpoint / MANIFEST).read_bytes().partition(b"\n")[0]
            config = json.loads(line)["contents"]["config"]
            return flat(config)
    return {}


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints, newest first; only the manifest is read, so their files need not be intact."""
    with suppress(OSError):
        return [path for _, path in sorted(checkpoints_in(folder).items(), reverse=True)]
    return []


def _run(path: Path, name: str, results: Mapping[str, float] | None = None) -> FoundRun:
    journal = journal_in(path)
    return FoundRun(name, journal, config_in(journal.parent), results or {})


def _name_of(path: Path) -> str:
    folder = path.resolve()
    if folder.is_file():
        return folder.parent.name if folder.name == JOURNAL else folder.stem
    return folder.name


def _compared(folder: Path, name: str) -> list[FoundRun]:
    """The runs of a comparison, if the folder contains a finished one."""
    try:
        rows = json.loads((folder / COMPARISON).read_bytes())
        places = [folder / variant for variant in VARIANTS]
        if len(rows) != len(places) or not all((place / JOURNAL).is_file() for place in places):
            # an unfinished comparison is a folder like any other
            return []
        prefix = f"{name} " if name else ""
        return [_run(place, f"{prefix}{row['label']}", _results(row)) for row, place in zip(rows, places, strict=True)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _results(row: Mapping[str, Any]) -> dict[str, float]:
    named = {
        "test loss": row.get("test_loss"),
        "test accuracy": row.get("accuracy"),
        "wall time (s)": row.get("seconds"),
    }
    # value == value, unless it is NaN
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float) and value == value}
