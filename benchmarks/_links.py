"""Links between processes of one machine: network namespaces, whose packets a process delays below TCP.

Each worker's only way out is a virtual device (TUN) that a process of its own reads: it holds every packet back for the
delay and sends it at the rate of the link, in both directions. That is what ``tc netem`` does, which not every kernel
has. It needs root, Linux, ``ip netns`` and ``/dev/net/tun``.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any, NamedTuple

MTU = 9000


class Link(NamedTuple):
    """A link of a worker: the rate of its uplink in Mbit/s, and its delay one way in ms."""

    rate: float
    delay: float


class Network:
    """The links of all workers, which are alike. ``carry`` sets what they are from now on.

    Args:
        names: the workers' namespaces.
        rate: shared with the process that carries packets; in Mbit/s.
        delay: the same, in ms.
    """

    def __init__(self, names: Sequence[str], rate: Any, delay: Any) -> None:
        self.names = names
        self._rate, self._delay = rate, delay

    def carry(self, link: Link) -> None:
        self._rate.value, self._delay.value = link


@contextmanager
def network(workers: int) -> Iterator[Network]:
    """Namespaces for so many workers, and the process that carries their packets."""
    processes = multiprocessing.get_context("spawn")
    ready, rate, delay = processes.Event(), processes.Value("d", 1000.0), processes.Value("d", 0.0)
    with namespaces(workers) as names:
        carrier = processes.Process(target=relay, args=(names, ready, rate, delay), daemon=True)
        carrier.start()
        try:
            if not ready.wait(300):
                raise SystemExit("the links could not be made: this needs root, ip netns and /dev/net/tun")
            yield Network(names, rate, delay)
        finally:
            carrier.terminate()
            carrier.join()


def join(namespace: str) -> None:
    """Moves this process into a worker's namespace, and gloo to its device. Before it has other threads."""
    enter(namespace)
    os.environ["GLOO_SOCKET_IFNAME"] = "tun0"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def enter(namespace: str) -> None:
    """Moves this process, as it is before it has other threads, into a network namespace."""
    with open(f"/run/netns/{namespace}") as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def namespaces(count: int) -> Iterator[list[str]]:
    """Network namespaces, which are removed at the end."""
    names = [f"links-{os.getpid()}-{worker}" for worker in range(count)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def device_in(namespace: str, worker: int) -> int:
    """The other end of a new network device of a worker: a file descriptor that reads and writes its packets."""
    found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(found, 0x400454CA, struct.pack("16sH22x", b"tun0", 0x1001))  # TUNSETIFF: IFF_TUN | IFF_NO_PI
    ip("-n", namespace, "addr", "add", f"10.77.0.{worker + 1}/24", "dev", "tun0")
    ip("-n", namespace, "link", "set", "tun0", "mtu", str(MTU), "txqueuelen", "10000", "up")
    return found


def relay(names: list[str], ready: Event, rate: Any, delay: Any) -> None:
    """Carries packets between the workers, at the rate and with the delay of the links."""
    ends = []
    for worker, name in enumerate(names):
        enter(name)
        ends.append(device_in(name, worker))
    ready.set()
    free = [0.0] * len(ends)  # when each uplink has sent all before
    flying: list[tuple[float, int, int, bytes]] = []  # when each arrives, its place among those, and to whom
    number = 0
    while True:
        now = time.monotonic()
        while flying and flying[0][0] <= now:
            _, _, target, packet = heapq.heappop(flying)
            os.write(ends[target], packet)
        readable, _, _ = select.select(ends, [], [], max(flying[0][0] - now, 0) if flying else None)
        now = time.monotonic()
        for end in readable:
            source = ends.index(end)
            for packet in _packets(end):
                if packet[0] >> 4 != 4:  # not IPv4
                    continue
                free[source] = max(free[source], now) + len(packet) * 8e-6 / rate.value
                number += 1
                heapq.heappush(flying, (free[source] + delay.value / 1000, number, packet[19] - 1, packet))


def _packets(end: int) -> Iterator[bytes]:
    for _ in range(64):
        try:
            yield os.read(end, MTU + 100)
        except BlockingIOError:
            return
