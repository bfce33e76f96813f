"""Connections of rank 0 with every other rank, for short messages and to notice ranks that are gone.

They are separate from those of the training. The operating system closes the connections of a process that dies,
whatever killed it, so the others notice at once.
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
"""Largest number of bytes in a greeting; a longer one does not come from a rank of this run."""

_PATIENCE = 5.0
"""Seconds that sending a message may block: a rank that is frozen must not freeze the others."""


class Connections:
    """Connections between rank 0 and each other rank.

    Args:
        collectives: the ranks; used once, so that they find each other.
        address: host name or address of rank 0; by default the name of its machine, and the loopback for ranks on the
            same machine.
        timeout: seconds in which all ranks must connect.

    Raises:
        OSError: if the ranks cannot reach each other.
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
        # Forked loading processes inherit the sockets, and would keep them open after this rank was killed.
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
                with suppress(ValueError, OSError):  # somebody else, or a rank that hung up
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
        """Sends a message to all that are connected. A rank that is gone shows in ``receive``."""
        data = json.dumps(message).encode() + b"\n"
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(data)

    def receive(self, timeout: float) -> list[tuple[int, dict[str, Any] | None]]:
        """Messages that came within ``timeout`` seconds, with their senders; None from a rank that is gone."""
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
        """Closes all connections."""
        self._selector.close()
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


def _close(connections: Connections | None) -> None:
    if connections is not None:
        for peer in connections._peers.values():
            peer.close()


def _line(peer: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        piece = peer.recv(1)
        if not piece or len(data) > _GREETING:
            raise ValueError("not a rank of this run")
        data += piece
    return data.decode()
