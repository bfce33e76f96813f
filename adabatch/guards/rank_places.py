"""Names, without a watchdog, why a rank waits in vain: the others have gone on, or one of them has raised an error.

A rank that does not move for a second leaves word on the side channel where it stands. While all ranks move, nothing is
sent. A rank that waits in a call that all must make, such as ``save()``, reads it, and learns that another one has gone
on and will never come. It then tells all ranks so, as does a rank that raises an error in a step.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.lost_ranks import RankLost
from adabatch.runtime import waiting
from adabatch.runtime.collectives import is_connection_lost
from adabatch.runtime.side_channel import ChannelClosed, SideChannel
from adabatch.runtime.waiting import named_if_long

_log = logging.getLogger("adabatch")

_PERIOD = 1.0
"""Seconds between two looks at whether a rank moves."""

_PATIENCE = 30.0
"""Seconds that a rank looks for the others; then it waits for them in a collective, which notices ranks that ended."""

_LONGEST_PAUSE = 0.1
"""Seconds between two looks of a waiting rank at whether all are there, of up to 500 ranks."""

_REQUESTS = 5000
"""Requests per second of more ranks together, roughly: one process holds the store, and answers all of them."""

_LOOKED_AT = 64
"""Ranks whose places a rank reads at a time, if there are few enough; at least the first rank and the next one."""

_UNTIL_KNOWN = 3.0
"""Seconds for which a rank that raises an error waits until the others know it: the store may end with this rank."""

_WORDS, _LEFT = "words", "left its loop"


class _Told(NamedTuple):
    """Why a rank ends.

    Args:
        loop, step: how far the furthest rank was by then.
        words: for an error.
    """

    loop: int
    step: int
    words: str

    def concerns(self, heartbeat: Heartbeat) -> bool:
        """Whether a rank still waits for one that has told this; a run that went on after an error is further."""
        return heartbeat.reached <= (self.loop, self.step)

    @property
    def known(self) -> str:
        """The name of the count of ranks that know it."""
        return f"ranks that know of loop {self.loop}, step {self.step}"


class RankPlaces:
    """What the ranks of a run tell each other on the side channel.

    Args:
        channel: of the run.
        heartbeat: of this rank.
    """

    def __init__(self, channel: SideChannel, heartbeat: Heartbeat) -> None:
        self._channel = channel
        self._heartbeat = heartbeat
        self._reporter: _Reporter | None = None
        self._cut_off = False  # the connection with another rank has broken

    def begin_loop(self) -> None:
        """A loop over the steps begins: from now on this rank leaves word where it stands whenever it does not move."""
        if self._reporter is None:
            self._reporter = _Reporter(self._channel, self._heartbeat)

    def left_loop(self, step: int) -> None:
        """This rank has left its loop over the steps in some step, and not because another one ended."""
        if self._cut_off:
            return
        with suppress(ChannelClosed):
            words = f"rank {self._channel.rank} has left its loop over the steps in step {step}, by `break` or an error"
            self._channel.post(_LEFT, json.dumps([self._heartbeat.loops, words]))

    def wait_for_all(self, call: str) -> None:
        """Waits until all ranks make a call, before its first collective.

        Args:
            call: its name, such as "save()".

        Raises:
            RuntimeError: if another rank has gone on, and will not come.
        """
        with named_if_long(call, self._channel.size), suppress(ChannelClosed):
            all_there = self._channel.arrive(call)
            now = time.monotonic()
            until, look, pause = now + _PATIENCE, now, 0.0005
            longest, period = max(_LONGEST_PAUSE, self._channel.size / _REQUESTS), _period(self._channel)
            while not all_there() and now < until:
                time.sleep(pause)
                now, pause = time.monotonic(), min(2 * pause, longest)
                if now >= look + period:
                    look = now
                    self._check_that_they_come(call, all_there)

    def _check_that_they_come(self, call: str, all_there: Callable[[], bool]) -> None:
        for rank, (loop, step, place) in _places(self._channel).items():
            # Asked after the place was read: a rank that has gone on from here did so once all had come.
            if (loop, step) > self._heartbeat.reached and not all_there():
                words = (
                    f"rank {self._channel.rank} waits in {call}, which all ranks must call, and rank {rank} has gone "
                    f"on to {place}: call it on every rank, and not under `if rank == 0` (the first rank alone writes)"
                )
                self._tell(_Told(loop, step, words))
                raise RuntimeError(words)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Names the error that another rank has raised.

        Raises:
            RankLost: in the place of the error of a connection that broke, if its rank has told why it ends.
        """
        try:
            yield
        except Exception as error:
            if not is_connection_lost(error):
                raise
            self._cut_off = True
            words = self._words()
            if words is None:
                raise
            raise RankLost(words) from error

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Also tells the others of an error of this rank that is raised in the block.

        Raises:
            RankLost: as in ``named``.
        """
        try:
            with self.named():
                yield
        except Exception as error:
            if not isinstance(error, RankLost) and not is_connection_lost(error):
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                words = f"rank {self._channel.rank} raised {said}, in {self._heartbeat.place}"
                self._tell(_Told(*self._heartbeat.reached, words))
            raise

    def _words(self) -> str | None:
        """What another rank has told before it ended."""
        told = None if self._reporter is None else self._reporter.told
        with suppress(ChannelClosed):
            told = told or _told(self._channel)
        if told is not None and told.concerns(self._heartbeat):
            return told.words
        with suppress(ChannelClosed):
            left = self._channel.read(_LEFT)
            loops, words = (0, "") if left is None else json.loads(left)
            if loops == self._heartbeat.loops:
                return f"{words}: leave it on all ranks after the same step"
        return None

    def _tell(self, told: _Told) -> None:
        """Tells the others why this rank ends, and waits until they know it, for a few seconds at most."""
        channel = self._channel
        with suppress(ChannelClosed):
            # A rank that raises an error itself counts among those that know: where all do, none waits.
            known, until = channel.add(told.known), time.monotonic() + _UNTIL_KNOWN
            if known == 1:
                channel.post(_WORDS, json.dumps(told))
            if self._reporter is not None:
                self._reporter.known = told.known
            while known < channel.size and time.monotonic() < until:
                time.sleep(0.02)
                known = channel.add(told.known, 0)


class _Reporter:
    """The thread that leaves word where this rank stands, and hears what another one tells.

    Attributes:
        told: what another rank has told before it ended.
        known: the last that this rank has heard or told itself.
    """

    def __init__(self, channel: SideChannel, heartbeat: Heartbeat) -> None:
        self.told: _Told | None = None
        self.known = ""
        self._channel = channel
        self._heartbeat = weakref.ref(heartbeat)
        self._over = threading.Event()
        self._last: list[object] = []  # where this rank stood at the last look
        self._posted: list[object] = []  # and when it last left word
        self._still_since = time.monotonic()
        self._warned = False  # that it has not moved since
        # A daemon, so that a process can end with it; but also told to end, since a thread that is stopped in the
        # middle of a call to the store may bring the process down.
        thread = threading.Thread(target=self._run, name="adabatch rank places", daemon=True)
        weakref.finalize(heartbeat, _end, self._over, thread)
        thread.start()

    def _run(self) -> None:
        with suppress(ChannelClosed):
            while not self._over.wait(_period(self._channel)):
                self._look()

    def _look(self) -> None:
        """Leaves word and listens, if this rank has not moved since the last look."""
        heartbeat = self._heartbeat()
        if heartbeat is None:
            return
        here = [*heartbeat.reached, str(heartbeat.place)]
        last, self._last = self._last, [heartbeat.moves, here]
        if last != self._last:
            self._still_since, self._warned = time.monotonic(), False
            return
        if self._posted != here:
            self._channel.post(_place_of(self._channel.rank), json.dumps(here))
            self._posted = [*here]
        told = _told(self._channel)
        if told is not None and told.known != self.known and told.concerns(heartbeat):
            self.told, self.known = told, told.known
            self._channel.add(told.known)
            _log.error("%s", told.words)
        if not self._warned and time.monotonic() >= self._still_since + waiting.PATIENCE:
            self._warned = True
            self._warn_of_those_behind(heartbeat)

    def _warn_of_those_behind(self, heartbeat: Heartbeat) -> None:
        """Says which ranks stand elsewhere and not further on, where they may evaluate, for instance, or wait too."""
        own = str(heartbeat.place)
        behind = [
            f"rank {rank} in {place}"
            for rank, (loop, step, place) in _places(self._channel).items()
            if (loop, step) <= heartbeat.reached and place != own
        ]
        if behind:
            _log.warning(
                "rank %d has waited for %g s in %s, and %s does not move: if it calls there what all ranks must call "
                "(a forward of the wrapped model, save(), an average over the ranks), the run hangs; call it on every "
                "rank, and not under `if rank == 0`",
                self._channel.rank, waiting.PATIENCE, heartbeat.place, ", ".join(behind),
            )  # fmt: skip


def _end(over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    if thread is not threading.current_thread():
        thread.join(_PERIOD)


def _told(channel: SideChannel) -> _Told | None:
    said = channel.read(_WORDS)
    return None if said is None else _Told(*json.loads(said))


def _places(channel: SideChannel) -> dict[int, tuple[int, int, str]]:
    """Loop, step and place of the first rank and of those after this one, as far as they have left word."""
    # The first rank is the one that scripts single out; where others do, some of the next ranks are among them.
    number = max(2, min(_LOOKED_AT, channel.size, _REQUESTS // channel.size))
    others = ((channel.rank + each) % channel.size for each in range(1, number))
    ranks = dict.fromkeys((0, *others))
    said = {rank: channel.read(_place_of(rank)) for rank in ranks}
    return {rank: tuple(json.loads(place)) for rank, place in said.items() if place is not None}


def _period(channel: SideChannel) -> float:
    """Seconds between two looks: longer with so many ranks that their requests would be too many."""
    return max(_PERIOD, channel.size / _REQUESTS)


def _place_of(rank: int) -> str:
    return f"place of rank {rank}"
