"""The colours of the kinds of reasons. The style sheet of the page defines them, also for the pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

ASSETS = resources.files("adabatch.report") / "assets"

REASON_VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "moved up": "--up",
        "moved down": "--down",
        "scheduled": "--scheduled",
        "at a limit": "--limit",
        "waits": "--waits",
        "uncertain": "--uncertain",
        "in place": "--place",
        "not asked": "--none",
        "failed": "--failed",
    }
)
"""Kinds of reasons -> their variables in ``page.css``, in the order of the key."""


@cache
def reason_colors() -> Mapping[str, str]:
    """Kinds of reasons -> their colours in the light theme, which is the first block of the style sheet."""
    sheet = (ASSETS / "page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"(--[a-z]+): *(#[0-9a-f]{6});", sheet[: sheet.index("}")]))
    return MappingProxyType({kind: light[name] for kind, name in REASON_VARIABLES.items()})
