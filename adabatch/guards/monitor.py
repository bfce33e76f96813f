"""The thread of a watchdog: it sends reports towards rank 0, learns which ranks are lost, and ends this rank if
necessary."""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable

from adabatch.guards.connections import Connections
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.lost_ranks import Report, lost_ranks

EXIT_RANK_LOST = 76
"""Exit status of a rank that ended because a rank was lost or hung: restart the run from its checkpoint."""

_STDERR = 2


class Monitor:
    """Watches one rank, together with the monitors of the other ranks.

    Reports go up the tree of connections to rank 0, which looks for lost ranks. Every finding is sent to all ranks.
    Each rank sends one message per interval, with all reports that it has from its subtree. The training thread raises
    the finding when it enters its next phase. If it does not within ``grace`` seconds, it waits in a collective, which
    Python cannot interrupt. The process then writes the finding and the stacks of its threads to standard error, and
    exits with ``EXIT_RANK_LOST``.

    Args:
        connections: with the other ranks.
        rank, size: number of this rank, and of all ranks.
        heartbeat: of the training thread.
        make_alarm: the finding -> the exception that is raised in that thread.
        timeout: seconds without a move, or without a report, after which a rank is lost.
        grace: see above.
    """

    def __init__(
        self,
        connections: Connections,
        rank: int,
        size: int,
        heartbeat: Heartbeat,
        *,
        make_alarm: Callable[[str], BaseException],
        timeout: float,
        grace: float,
    ) -> None:
        self._connections = connections
        self._rank = rank
        self._size = size
        self._heartbeat = heartbeat
        self._make_alarm = make_alarm
        self._timeout = timeout
        self._grace = grace
        # A tenth, so that a report or two may be late without a false alarm.
        self._interval = min(1.0, timeout / 10)
        self._heard: dict[int, tuple[Report, float]] = {}
        self._due = 0.0  # when this rank reports next
        self._left = False  # this rank has reached the end of its run
        self._told = False  # and has told its neighbours so
        self._failure: str | None = None  # an error of this rank, which the others do not know yet
        self._stopping = False
        self._lost_at = math.inf
        self.finding: str | None = None
        self.ended = threading.Event()
        """Set once a rank is lost, or all ranks have left."""
        # A daemon, so that a run that leaves without stop() can end.
        self._thread = threading.Thread(target=self._run, name="adabatch watchdog", daemon=True)

    def start(self) -> None:
        """Starts the thread. Every rank counts as having reported now."""
        now = time.monotonic()
        # Rank 0 hears of all ranks through the tree; each other rank watches those at the ends of its own connections.
        others = range(1, self._size) if self._rank == 0 else self._neighbours()
        self._heard = {rank: (Report(0, "the time before its first report", True, 0.0), now) for rank in others}
        self._thread.start()

    def leave(self) -> None:
        """This rank has reached the end of its run."""
        self._left = True
        self._connections.wake()

    def fail(self, failure: str) -> None:
        """This rank ends with its own error; returns once the other ranks have been told."""
        self._failure = failure
        self.stop()

    def stop(self) -> None:
        """Stops the thread."""
        self._stopping = True
        self._connections.wake()
        self._thread.join()
        self._connections.close()
        self._heartbeat.alarm = None

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._turn()
        if self._failure is not None:
            # last, so that the neighbours learn the reason before the connection closes
            self._connections.send({"lost": self._failure})

    def _turn(self) -> None:
        """Handles messages; sends a report and looks for lost ranks once per interval."""
        for peer, message in self._connections.receive(max(0.0, self._due - time.monotonic())):
            if message is None:
                self._hung_up(peer)
            elif "lost" in message:
                self._declare_lost(message["lost"])
            elif "all left" in message:
                self._end_together()
            else:
                now = time.monotonic()
                for rank, *fields in message["reports"]:
                    report = Report(*fields)
                    # Kept as the rank sent it: the time that has passed since then is added when it is used.
                    self._heard[rank] = report._replace(still=report.still - report.silent), now - report.silent
        now = time.monotonic()
        if self.ended.is_set():
            self._due = now + self._interval
            # The training thread has not raised the alarm, so it hangs in a call that Python cannot interrupt.
            if now >= self._lost_at + self._grace:
                self._end_process()
            return
        if self._rank == 0 and self._left and all(report.left for report, _ in self._heard.values()):
            self._end_together()
        # Only in this case: if ranks answered every message, two of them would never stop.
        if now >= self._due or (self._left and not self._told):
            self._due, self._told = now + self._interval, self._left
            self._tell_and_look(now)

    def _tell_and_look(self, now: float) -> None:
        here = self._report()
        reports = {
            rank: report._replace(silent=now - at, still=report.still + now - at)
            for rank, (report, at) in self._heard.items()
        }
        # Only this rank's own report goes down: children need to know that their parent lives, not where all others
        # are.
        below = {rank: report for rank, report in reports.items() if rank != self._connections.parent}
        self._connections.send({"reports": [[self._rank, *here]]}, up=False)
        self._connections.send(
            {"reports": [[rank, *report] for rank, report in [(self._rank, here), *below.items()]]}, down=False
        )
        if self._rank == 0:
            reports[0] = here
        else:  # rank 0 finds out itself which rank hangs; the others notice only if a neighbour stops reporting
            reports = {
                rank: reports[rank]._replace(moves=0, between=True, still=0)
                for rank in self._neighbours()
                if rank in reports
            }
        found = lost_ranks(reports, timeout=self._timeout)
        if found is not None:
            self._declare_lost(found)

    def _neighbours(self) -> list[int]:
        parent = self._connections.parent
        return [*self._connections.children, *([] if parent is None else [parent])]

    def _end_together(self) -> None:
        if not self.ended.is_set():
            # only down: rank 0 says it first, and each rank passes it on
            self._connections.send({"all left": True}, up=False)
            self.ended.set()

    def _report(self) -> Report:
        where = self._heartbeat
        moves = math.inf if self._left else where.moves
        return Report(moves, str(where.place), where.between, where.still)

    def _hung_up(self, peer: int) -> None:
        # or the rank would be found silent as well, later
        report, _ = self._heard.pop(peer)
        if self.ended.is_set():
            return
        # at the end of a run the ranks hang up one after another
        if not (report.left and self._left):
            self._declare_lost(f"rank {peer} has died, last seen in {report.place}")

    def _declare_lost(self, found: str) -> None:
        """A rank is lost: tells the neighbours in the tree."""
        if self.finding is None:  # later findings are consequences of the first
            self._connections.send({"lost": found})
            self.finding = found
            self._lost_at = time.monotonic()
            self._heartbeat.alarm = self._make_alarm(found)
            self.ended.set()

    def _end_process(self) -> None:
        # Not print(), and os._exit() instead of sys.exit(): the main thread hangs, and may hold the lock of sys.stderr;
        # handlers at exit would wait for it, or for the other ranks.
        os.write(_STDERR, f"adabatch: rank {self._rank} ends: {self.finding}\n".encode())
        faulthandler.dump_traceback(file=_STDERR)
        os._exit(EXIT_RANK_LOST)
