"""Connections between the ranks, for short messages and to notice ranks that are gone: a tree with rank 0 at its root.

They are separate from those of the training. The operating system closes the connections of a process that dies,
whatever the cause, so its neighbours notice at once and tell the others. No rank has more than ``DEGREE + 1``
connections: in a star of 10,000 ranks, rank 0 would need more files than a process may open.
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

DEGREE = 64
"""Children per rank of the tree. Up to 65 ranks are connected with rank 0 directly, 10,000 over at most three links."""

_PATIENCE = 5.0
"""Seconds that sending a message may block: a rank that is frozen must not freeze the others."""


class Connections:
    """Connections of this rank with its parent and its children: rank r is a child of rank ``(r - 1) // degree``.

    Args:
        collectives: the ranks; used once, so that they find each other.
        address: host name or address of rank 0; by default the name of its machine, and the loopback for ranks on the
            same machine. Other ranks that have children are reached by the names of their machines.
        timeout: seconds in which all ranks must connect.
        degree: children of a rank at most.

    Attributes:
        parent: its rank; None for rank 0.
        children: their ranks.

    Raises:
        OSError: if the ranks cannot reach each other.
    """

    def __init__(self, collectives: Collectives, *, address: str | None, timeout: float, degree: int = DEGREE) -> None:
        rank = collectives.rank
        self.parent = (rank - 1) // degree if rank else None
        self.children = range(rank * degree + 1, min((rank + 1) * degree + 1, collectives.size))
        self._buffers: dict[int, bytes] = {}
        self._peers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        # A socket, because select() cannot wait for an event of Python and for sockets at once.
        self._waker, woken = socket.socketpair()
        woken.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ, None)
        self._woken = woken
        self._meet(collectives, address if rank == 0 else None, timeout)
        for rank, peer in self._peers.items():
            peer.settimeout(_PATIENCE)
            self._buffers[rank] = b""
            self._selector.register(peer, selectors.EVENT_READ, rank)
        # Forked loading processes inherit the sockets, and would keep them open after this rank was killed.
        mine = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(mine()))

    def _meet(self, collectives: Collectives, address: str | None, timeout: float) -> None:
        """Waits for the connections of the children, and connects with the parent."""
        host, token = socket.gethostname(), secrets.token_hex(16)
        # a leaf needs no server, but takes part in the exchange, for which all ranks wait
        if not self.children:
            invitations = collectives.gather_bytes(b"")
            self._call(invitations, collectives.rank, timeout)
            return
        # any free port; the children learn it from the exchange
        with socket.create_server(("", 0), backlog=len(self.children)) as server:
            said = [host, address or host, server.getsockname()[1], token]
            invitations = collectives.gather_bytes(json.dumps(said).encode())
            # This does not wait for the parent to accept: its server listens, and its backlog has room for all
            # children.
            self._call(invitations, collectives.rank, timeout)
            server.settimeout(timeout)
            while not all(child in self._peers for child in self.children):
                peer, _ = server.accept()
                peer.settimeout(timeout)
                with suppress(ValueError, OSError):  # somebody else, or a rank that hung up
                    heard, rank = _line(peer).split()
                    # The token shows a rank of this run. compare_digest takes equally long for all wrong ones, so the
                    # time does not reveal it.
                    if hmac.compare_digest(heard, token) and int(rank) in self.children:
                        self._peers[int(rank)] = peer

    def _call(self, invitations: list[bytes], rank: int, timeout: float) -> None:
        if self.parent is None:
            return
        host, address, port, token = json.loads(invitations[self.parent])
        # An address that the user gave is used even on the same machine.
        near = host == socket.gethostname() and host == address
        peer = socket.create_connection(("127.0.0.1" if near else address, port), timeout=timeout)
        peer.sendall(f"{token} {rank}\n".encode())
        self._peers[self.parent] = peer

    def send(self, message: Mapping[str, Any], *, up: bool = True, down: bool = True) -> None:
        """Sends a message to the parent, the children, or both. A rank that is gone shows in ``receive``."""
        data = json.dumps(message).encode() + b"\n"
        for rank, peer in self._peers.items():
            if up if rank == self.parent else down:
                with suppress(OSError):
                    peer.sendall(data)

    def wake(self) -> None:
        """Makes ``receive``, which another thread may be waiting in, return at once."""
        with suppress(OSError):
            self._waker.send(b"!")

    def receive(self, timeout: float) -> list[tuple[int, dict[str, Any] | None]]:
        """Messages that arrive within ``timeout`` seconds, with their senders; None from a rank that is gone."""
        found: list[tuple[int, dict[str, Any] | None]] = []
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                with suppress(OSError):
                    self._woken.recv(64)
                continue
            rank, peer = key.data, self._peers[key.data]
            try:
                data = peer.recv(65536)
            except OSError:
                data = b""
            # a read may end in the middle of a message, whose rest stays in the buffer
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
        for peer in (*self._peers.values(), self._waker, self._woken):
            peer.close()
        self._peers.clear()


def _close(connections: Connections | None) -> None:
    if connections is not None:
        for peer in (*connections._peers.values(), connections._waker, connections._woken):
            peer.close()


def _line(peer: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        # one byte at a time, because what follows the greeting belongs to `receive`
        piece = peer.recv(1)
        if not piece or len(data) > _GREETING:
            raise ValueError("not a rank of this run")
        data += piece
    return data.decode()
