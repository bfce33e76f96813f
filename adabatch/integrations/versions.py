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
    if release_numbers(found) < release_numbers(oldest):
        raise ImportError(
            f"this needs {package} {oldest} or newer, and {found} is installed: pip install '{package}>={oldest}'"
        )


def release_numbers(version: str) -> tuple[int, ...]:
    """The numbers at the front of a version, without zeros at their end: (2, 13) of "2.13.0+cpu"."""
    front = re.match(r"\d+(\.\d+)*", version)
    numbers = [] if front is None else [int(number) for number in front[0].split(".")]
    while numbers and numbers[-1] == 0:  # 2.0 and 2 are the same
        numbers.pop()
    return tuple(numbers)
