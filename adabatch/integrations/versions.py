"""Checks that a host is installed and new enough, when its integration is imported."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require_version(package: str, oldest: str) -> None:
    """Checks the version of a package before it is imported.

    Args:
        package: its name for pip.
        oldest: the oldest release that works, such as "1.1".

    Raises:
        ImportError: if it is not installed, or older.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"this needs {package} {oldest} or newer: pip install '{package}>={oldest}'") from None
    if _numbers(found) < _numbers(oldest):
        raise ImportError(
            f"this needs {package} {oldest} or newer, and {found} is installed: pip install '{package}>={oldest}'"
        )


def _numbers(release: str) -> tuple[int, ...]:
    """The numbers at the front of a version, such as (2, 13, 0) of "2.13.0+cpu"."""
    front = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(number) for number in front[0].split(".")) if front else ()
