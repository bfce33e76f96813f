"""The parser of commands that need none of the extras: argparse, with errors in one line."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn


class PlainParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line with status 2, and which takes no abbreviated options."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            # an abbreviation would be ambiguous as soon as another option begins like it
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Prints the error in one line, and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def not_negative(text: str) -> float:
    """Type of an argument: a finite number of zero or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def positive(text: str) -> float:
    """Type of an argument: a finite number above zero."""
    value = not_negative(text)
    if not value:
        raise ValueError
    return value


# argparse puts the name of the type into its message: "invalid positive number value: 'x'"
not_negative.__name__ = "number of zero or more"
positive.__name__ = "positive number"
