"""Pictures and pages from journals.

The page of ``adabatch report`` and the numbers in it need numpy only. Pictures need matplotlib, the extra
``adabatch[report]``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path

from adabatch.report.curves import Journal

__all__ = ["draw", "require_matplotlib"]


def require_matplotlib() -> None:
    """Says what to install where pictures cannot be drawn.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "adabatch.report draws with matplotlib: install it with pip install 'adabatch[report]'"
        ) from error


def draw(runs: Journal | Mapping[str, Journal], out: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write a PNG with panels over the examples consumed: batch size, learning rate, noise scale, loss.

    The batch size is a step line on a base-2 axis; the learning rate is the applied one, a line for each
    parameter group; the noise scale shows each step's own estimate as a dot and the quotient of the averages
    as a line, on a log axis, without estimates that are not positive or lie far off; the loss shows each
    step's faintly, and its mean over 2 % of the longest run. Where a journal has noise by layer
    (``Measure(layers=)``), a fifth panel below the noise scale shows the layers of the first run that has.

    Args:
        runs: the journal of a run (a path, or its lines), or several by label; the first is drawn on top.
        out: the PNG file, overwritten where it exists.
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
