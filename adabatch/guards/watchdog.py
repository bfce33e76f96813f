"""``Watchdog``: if a rank dies, hangs or raises, the others end soon, with an error that names it."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Protocol, runtime_checkable

from adabatch.arguments import checked
from adabatch.guards.connections import Connections
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.lost_ranks import RankLost
from adabatch.guards.monitor import EXIT_RANK_LOST, Monitor
from adabatch.guards.rank_places import RankPlaces
from adabatch.runtime.collectives import Collectives, is_connection_lost

__all__ = ["EXIT_RANK_LOST", "RankLost", "Watchdog"]


@runtime_checkable
class WatchedRun(Protocol):
    """A run that a ``Watchdog`` can watch, such as an ``AdaptiveBatch``."""

    @property
    def collectives(self) -> Collectives:
        """The ranks of the run."""
        ...

    @property
    def heartbeat(self) -> Heartbeat:
        """What this rank is doing now."""
        ...


@runtime_checkable
class PlacedRun(Protocol):
    """A run whose ranks can tell each other where they stand."""

    @property
    def places(self) -> RankPlaces | None:
        """None if they cannot."""
        ...


class Watchdog:
    """Watches all ranks while they train.

        with adabatch.Watchdog(batches, timeout=120):
            for step in batches.steps(order, until=total):
                ...

    If a rank **dies** (killed, out of memory, crashed), the others notice at once. If it **raises** an error in the
    block, it tells them. If it **hangs**, or its process or machine is frozen or cut off, they find out after
    ``timeout`` seconds in which it did not reach the next phase of a step (loading, forward, backward, measuring,
    update) while others are ahead and wait for it. All ranks then leave the block with a ``RankLost`` that names the
    lost rank and its phase; a rank that raised an error leaves with that error.

    A rank that waits in a collective cannot be interrupted from Python. If its backend does not time out within
    ``grace`` seconds, the process writes the same message and the stacks of its threads to standard error, and exits
    with status ``EXIT_RANK_LOST`` (76). Restart such a run from its checkpoint.

    Two things are not detected: which rank hangs if all are in the same phase of a step, and a hang in your own
    collectives between two steps, where a run may take any time to test or to save.

    At the end of the block each rank waits for the others. The watchdog costs one thread, one connection with rank
    0, and one message of about 150 bytes per second and direction; the training itself sends nothing more. With more
    than 65 ranks the connections form a tree, in which each rank has at most 65 connections and forwards the reports of
    up to 64 others. On a single process the watchdog does nothing.

    Args:
        batches: the run. Every rank creates its watchdog after it.
        timeout: in seconds. It must be longer than the longest phase of a step, and than anything that one rank does
            alone between steps.
        grace: in seconds; see above.
        address: host name or address of rank 0, if its machine cannot be reached by its own name. Beyond 65 ranks,
            other machines must be reachable by theirs.

    Raises:
        ValueError: if ``timeout`` is not positive and finite, or ``grace`` is negative.
    """

    @checked
    def __init__(
        self, batches: WatchedRun, *, timeout: float = 300.0, grace: float = 10.0, address: str | None = None
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        if not 0 <= grace < math.inf:
            raise ValueError(f"grace must be a number of seconds, 0 or more, got {grace!r}")
        self._collectives = batches.collectives
        self._heartbeat = batches.heartbeat
        self._timeout = timeout
        self._grace = grace
        self._address = address
        self._places = batches.places if isinstance(batches, PlacedRun) else None
        self._monitor: Monitor | None = None

    def __enter__(self) -> Watchdog:
        ranks = self._collectives
        if ranks.size > 1:
            if self._places is not None:
                self._places.wait_for_all("`with Watchdog(...)`")
            self._monitor = Monitor(
                Connections(ranks, address=self._address, timeout=self._timeout),
                ranks.rank,
                ranks.size,
                self._heartbeat,
                make_alarm=RankLost,
                timeout=self._timeout,
                grace=self._grace,
            )
            self._monitor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        if error is None:
            # Not stop(): a rank that closed its connections while others still train would look dead to them.
            monitor.leave()
            monitor.ended.wait()
        # The error only says that a peer has gone, or what it has told. The monitors soon tell which rank, and where
        # it was, and that is what the user needs.
        elif _is_of_another(error):
            monitor.ended.wait(self._grace)
        if monitor.finding is not None:
            monitor.stop()
            if error is None or _is_of_another(error):
                raise RankLost(monitor.finding) from error
        elif error is None:
            monitor.stop()
        else:
            # The first line only: the rank prints its whole error itself.
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            monitor.fail(f"rank {self._collectives.rank} raised {said}, in {self._heartbeat.place}")


def _is_of_another(error: BaseException) -> bool:
    """Whether an error only says that another rank has ended."""
    return isinstance(error, RankLost) or is_connection_lost(error)
