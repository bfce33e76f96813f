"""The picture at the end of a run, where the ``report`` extra is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adabatch.cli.display import Display


def picture(journals: Mapping[str, Path], path: Path, *, display: Display, title: str | None = None) -> None:
    """Draws journals into ``path``; says what to install where it cannot."""
    try:
        from adabatch.report import draw
    except ImportError as error:
        display.say(f"no picture: {error}")
        return
    draw(journals, path, title=title)
    display.say(f"picture: {path}")
