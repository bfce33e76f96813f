"""Pictures of runs and of schedules, if the ``report`` extra is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adabatch.cli.display import Display
from adabatch.report import draw, require_matplotlib


def picture(journals: Mapping[str, Path], path: Path, *, display: Display) -> None:
    """Draws journals into ``path``; says what to install if matplotlib is missing."""
    try:
        draw(journals, path)
    except ImportError as error:
        display.say(f"no picture: {error}")
        return
    display.say(f"picture: {path}")


def draw_picture(build: Callable[[Any], list[Any]], out: Path, *, title: str | None = None, display: Display) -> None:
    """Draws the panels of ``build`` into ``out``; says what to install if matplotlib is missing.

    Args:
        build: module ``adabatch.report.shapes`` -> its panels.
        out: the PNG file; its folder is created.
        title: a heading.
        display: for that message.
    """
    try:
        require_matplotlib()
        from adabatch.report import shapes
    except ImportError as error:
        display.say(f"no picture: {error}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    shapes.draw_panels(build(shapes), out, title=title)
    display.say(f"picture: {out}")
