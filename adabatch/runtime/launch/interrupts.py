"""Ctrl-C while the ``adabatch`` command still imports torch, which takes seconds: one line, its status, no traceback.

The package imports this module first, before anything that imports torch, and calls ``over`` last. In between a
``KeyboardInterrupt`` would end as a traceback through whatever is being imported. Programs that import the package are
not touched.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

INTERRUPTED = 130
"""Exit status after Ctrl-C; as in shells: 128 plus the number of SIGINT."""


def _is_command() -> bool:
    """Whether this process runs ``adabatch`` or ``python -m adabatch``, with whatever arguments."""
    if sys.argv[:1] == ["-m"]:  # as Python leaves it until the package is imported
        given = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
        return given[-1:] in (["adabatch"], ["-madabatch"])
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("adabatch", "adabatch.exe")


def _end(*_: Any) -> None:
    # Nothing is under way that could be lost. An exception could be swallowed by an import that fails for it.
    os.write(2, b"adabatch: interrupted\n")
    os._exit(INTERRUPTED)


def _listens() -> bool:
    # only the main thread may set a handler, and one that somebody else has set is kept
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return _is_command() and own and threading.current_thread() is threading.main_thread()


if _listens():
    signal.signal(signal.SIGINT, _end)


def over() -> None:
    """Gives Ctrl-C back its meaning: the package is imported, and the command handles it from here on."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
