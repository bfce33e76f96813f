"""Pictures and pages from journals.

The page of ``adabatch report`` and the numbers in it need numpy only. Pictures need matplotlib, the extra
``adabatch[report]``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adabatch.report.charts import AXES
from adabatch.report.curves import JournalSource

__all__ = ["AXES", "draw", "require_matplotlib", "write_charts"]


def require_matplotlib() -> None:
    """Checks that pictures can be drawn.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "adabatch.report draws with matplotlib: install it with pip install 'adabatch[report]'"
        ) from error


def draw(
    runs: JournalSource | Mapping[str, JournalSource], out: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Write a PNG with panels over the examples consumed: batch size, learning rate, noise scale, loss.

    The batch size is a step line on a base-2 axis. The learning rate is the applied one, with one line per parameter
    group. The noise scale has a dot for each step's own estimate and a line for the quotient of the averages, on a log
    axis; estimates that are not positive are omitted, and outliers do not set the axis. The loss of each step is faint,
    with its mean over 2 % of the longest run. If a journal contains noise per layer (``Measure(layers=)``), a fifth
    panel below the noise scale shows the layers of the first such run.

    Args:
        runs: the journal of a run (a path, or its lines), or several by label; the first is drawn on top.
        out: the PNG file; an existing one is overwritten.
        title: a heading.

    Returns:
        ``out`` as a path.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there are no runs, or a journal is damaged or has no complete step; names it.
    """
    require_matplotlib()
    # Imported by name here, so that the page, which needs no matplotlib, can be made without it.
    written: Path = importlib.import_module("adabatch.report.picture").write_picture(runs, out, title=title)
    return written


def write_charts(numbers: Mapping[str, Any], folder: str | os.PathLike[str], *, over: str = "examples") -> list[Path]:
    """Write a PNG for each chart of a report; one for each metric that was evaluated, and for each run with layers.

    Args:
        numbers: what the page draws (``page.drawn``).
        folder: where the pictures go; it exists.
        over: the axis: "examples", "steps", "tokens" or "time".

    Returns:
        The pictures.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no run counts what the axis asks for.
    """
    require_matplotlib()
    written: list[Path] = importlib.import_module("adabatch.report.chart_pictures").write_pictures(
        numbers, Path(folder), over=over
    )
    return written
