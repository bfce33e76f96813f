"""Connections of rank 0 with every other rank, beside those of the training: short messages, and who is gone.

The system closes the connections of a process that dies, whatever killed it, so the others know at once.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from adabatch.runtime.collectives import Collectives

_GREETING = 256
"""Bytes of a greeting at most: more come from a stranger."""

_PATIENCE = 5.0
"""Seconds that a message may wait for a rank to take it; one that is frozen must not freeze the others."""


class Connections:
    """Rank 0 in the middle, one connection to each other rank.

    Args:
        collectives: the ranks, which use it once to find each other.
        address: host name or number under which rank 0 is reached; by default what its machine calls itself, and the
            loopback for ranks on the same machine.
        timeout: seconds until all must be connected.

    Raises:
        OSError: the ranks cannot reach each other.
    """

    def __init__(self, collectives: Collectives, *, address: str | None, timeout: float) -> None:
        self._buffers: dict[int, bytes] = {}
        self._peers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        if collectives.rank == 0:
            self._invite(collectives, address, timeout)
        else:
            self._join(collectives, timeout)
        for rank, peer in self._peers.items():
            peer.settimeout(_PATIENCE)
            self._buffers[rank] = b""
            self._selector.register(peer, selectors.EVENT_READ, rank)
        # Loading processes that are forked off hold copies of the sockets, which would outlive a rank that is killed.
        mine = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(mine()))

    def _invite(self, collectives: Collectives, address: str | None, timeout: float) -> None:
        token = secrets.token_hex(16)
        with socket.create_server(("", 0), backlog=collectives.size) as server:
            host = socket.gethostname()
            invitation = json.dumps([host, address or host, server.getsockname()[1], token])
            collectives.gather_bytes(invitation.encode())
            server.settimeout(timeout)
            while len(self._peers) < collectives.size - 1:
                peer, _ = server.accept()
                peer.settimeout(timeout)
                with suppress(ValueError, OSError):  # a stranger, or one that hung up
                    said, rank = _line(peer).split()
                    if hmac.compare_digest(said, token):
                        self._peers[int(rank)] = peer

    def _join(self, collectives: Collectives, timeout: float) -> None:
        host, address, port, token = json.loads(collectives.gather_bytes(b"")[0])
        near = host == socket.gethostname() and host == address
        peer = socket.create_connection(("127.0.0.1" if near else address, port), timeout=timeout)
        peer.sendall(f"{token} {collectives.rank}\n".encode())
        self._peers[0] = peer

    def send(self, message: Mapping[str, Any]) -> None:
        """To all that are connected; one that is gone is found out when it is listened to."""
        data = json.dumps(message).encode() + b"\n"
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(data)

    def receive(self, timeout: float) -> list[tuple[int, dict[str, Any] | None]]:
        """What came within ``timeout`` seconds, by sender; None from one that is gone."""
        found: list[tuple[int, dict[str, Any] | None]] = []
        for key, _ in self._selector.select(timeout):
            rank, peer = key.data, self._peers[key.data]
            try:
                data = peer.recv(65536)
            except OSError:
                data = b""
            *lines, self._buffers[rank] = (self._buffers[rank] + data).split(b"\n")
            found += [(rank, json.loads(line)) for line in lines]
            if not data:
                self._selector.unregister(peer)
                del self._peers[rank]
                peer.close()
                found.append((rank, None))
        return found

    def close(self) -> None:
        """Ends all connections."""
        self._selector.close()
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


def _close(star: Connections | None) -> None:
    if star is not None:
        for peer in star._peers.values():
            peer.close()


def _line(peer: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        piece = peer.recv(1)
        if not piece or len(data) > _GREETING:
            raise ValueError("not a rank of this run")
        data += piece
    return data.decode()
