"""Ports for the groups of processes that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_OURS = range(10_000, 32_000)
"""Below the ports which the system gives to outgoing connections and to servers that ask for any port. One of those may
be taken by another test before the process that shall listen on it has started; its peers would then wait in vain."""
_CHANCE = random.SystemRandom()  # tests seed the generator of `random`, and those of two workers would choose alike


def free_port() -> int:
    """A port of this machine that nobody listens on, and that the system gives to nobody."""
    while True:
        port = _CHANCE.choice(_OURS)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
