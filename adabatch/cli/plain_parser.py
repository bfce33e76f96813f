"""The parser of commands that need none of the extras: argparse, with errors in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class PlainParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line with status 2, and which takes no abbreviated options."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Prints the error in one line, and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")
