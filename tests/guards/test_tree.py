"""The watchdog's tree of connections, with many ranks as threads of one process: who holds what, and who hears what."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest

from adabatch.guards.connections import Connections
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.monitor import Monitor
from adabatch.runtime.collectives import Collectives


class Threads:
    """What ``Connections`` needs of collectives, among threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, rows: list[bytes]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._rows = barrier, rows

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self._rows[self.rank] = data
        self._barrier.wait(30)
        return list(self._rows)


@contextmanager
def ranks(size: int, degree: int, *, timeout: float = 60.0) -> Iterator[tuple[list[Connections], list[Monitor]]]:
    """Monitors of so many ranks, started."""
    barrier, rows = threading.Barrier(size), [b""] * size

    def connected(rank: int) -> Connections:
        joined = cast("Collectives", Threads(rank, size, barrier, rows))
        return Connections(joined, address="127.0.0.1", timeout=30, degree=degree)

    with ThreadPoolExecutor(size) as pool:
        connections = list(pool.map(connected, range(size)))
    monitors = [
        Monitor(each, rank, size, Heartbeat(), make_alarm=RuntimeError, timeout=timeout, grace=1e9)
        for rank, each in enumerate(connections)
    ]
    for monitor in monitors:
        monitor.start()
    try:
        yield connections, monitors
    finally:
        for monitor in monitors:
            monitor.stop()


def everyone(monitors: list[Monitor], *, but: int = -1) -> list[str | None]:
    """What each rank has found, once it has ended."""
    for rank, monitor in enumerate(monitors):
        assert rank == but or monitor.ended.wait(30), rank
    return [monitor.finding for rank, monitor in enumerate(monitors) if rank != but]


SIZE, DEGREE = 14, 3  # 0 over 1 to 3, those over 4 to 12, and 4 over 13


def test_no_rank_holds_more_connections_than_its_children_and_its_parent() -> None:
    with ranks(SIZE, DEGREE) as (connections, monitors):
        assert [each.parent for each in connections] == [None, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
        assert sorted(child for each in connections for child in each.children) == list(range(1, SIZE))
        assert max(len(each._peers) for each in connections) == DEGREE + 1
        for monitor in monitors:
            monitor.leave()
        assert everyone(monitors) == [None] * SIZE


@pytest.mark.parametrize("lost", [13, 4, 1], ids=["leaf", "relay", "child of the root"])
def test_all_hear_of_a_rank_that_dies(lost: int) -> None:
    with ranks(SIZE, DEGREE) as (connections, monitors):
        monitors[lost]._stopping = True
        connections[lost].wake()
        monitors[lost]._thread.join()
        connections[lost].close()  # as the operating system does for a process that is killed
        assert all(f"rank {lost} has died" in str(found) for found in everyone(monitors, but=lost))


@pytest.mark.parametrize("raising", [13, 2, 0])
def test_all_hear_of_an_error(raising: int) -> None:
    with ranks(SIZE, DEGREE) as (_, monitors):
        monitors[raising].fail(f"rank {raising} raised ValueError: out of range")
        assert set(everyone(monitors, but=raising)) == {f"rank {raising} raised ValueError: out of range"}


def test_the_root_finds_the_rank_that_hangs_three_links_away() -> None:
    with ranks(SIZE, DEGREE, timeout=1.0) as (_, monitors):
        stopped = threading.Event()

        def move() -> None:
            while not stopped.is_set():
                for monitor in monitors[:13]:
                    monitor._heartbeat.moves += 1
                    monitor._heartbeat.since = time.monotonic()
                stopped.wait(0.02)

        mover = threading.Thread(target=move)
        mover.start()
        try:
            assert all("rank 13 has not moved for 1 s" in str(found) for found in everyone(monitors))
        finally:
            stopped.set()
            mover.join()


def test_a_rank_sends_one_message_per_interval(monkeypatch: Any) -> None:
    """However much it hears: an answer to every message would be answered in turn, without an end."""
    sent: dict[int, int] = {}
    original = Connections.send

    def counted(self: Connections, message: Any, **ways: Any) -> None:
        sent[id(self)] = sent.get(id(self), 0) + 1
        original(self, message, **ways)

    monkeypatch.setattr(Connections, "send", counted)
    with ranks(5, 2, timeout=1e6) as (connections, monitors):
        hundred = {"reports": [[0, 1, "forward", False, 0.0, 0.0]]}
        for _ in range(100):
            original(connections[0], hundred)
        for monitor in monitors:
            monitor.leave()
        everyone(monitors)
    # Up and down, at the start and on leaving, and a handful of intervals if the machine is slow; not one per message.
    assert max(sent.values()) < 50
