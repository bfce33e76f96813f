"""Says what a rank waits for, if it waits for long."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

_log = logging.getLogger("adabatch")

PATIENCE = 60.0
"""Seconds that a rank waits without a word."""


@contextmanager
def named_if_long(call: str, num_ranks: int) -> Iterator[None]:
    """Logs a warning if the block, in which this rank waits for all others, takes longer than ``PATIENCE``.

    It is no error, because other ranks may have something to do first, such as an evaluation.

    Args:
        call: what all ranks must call, such as "save()".
        num_ranks: how many there are; one does not wait.
    """
    if num_ranks == 1:
        yield
        return
    message = (
        f"this rank has waited for {PATIENCE:g} s in {call}, which all ranks must call. If the others do not, because "
        f"it stands under `if rank == 0`, the run hangs: call it on every rank"
    )
    timer = Timer(PATIENCE, _log.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # at once, since it is cancelled
