"""A side channel for ranks that cannot wait for each other: the store through which the processes of a job met.

A rank that waits in a collective for one that never comes can neither send nor receive in another. The store needs no
partner: a rank leaves a text there, and others read it when they want to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import distributed_c10d

from adabatch.runtime.collectives import Collectives, digest_of


class ChannelClosed(Exception):
    """The process that holds the store has ended, or the process groups were destroyed."""


class SideChannel:
    """The texts and counts that the ranks of one run leave for each other.

    Every method raises ``ChannelClosed`` if the store is gone.

    Args:
        name: of the run, the same on all of its ranks, and of no other.
        rank, size: number of this rank, and of all.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._name = name

    def post(self, what: str, text: str) -> None:
        """Leaves a text, instead of an earlier one of this name."""
        try:
            _store().set(self._key(what), text)
        except RuntimeError as error:
            raise ChannelClosed from error

    def read(self, what: str) -> str | None:
        """The text of this name; None if there is none."""
        try:
            store = _store()
            # get() would wait for the key
            return store.get(self._key(what)).decode() if store.check([self._key(what)]) else None
        except RuntimeError as error:
            raise ChannelClosed from error

    def add(self, what: str, number: int = 1) -> int:
        """Adds to a count that all ranks share; its new value."""
        try:
            return int(_store().add(self._key(what), number))
        except RuntimeError as error:
            raise ChannelClosed from error

    def arrive(self, place: str) -> Callable[[], bool]:
        """This rank is where all ranks come to; a function that says whether all are there."""
        # Ranks come to the same place again, so each counts how often it was there.
        turn = f"{place}/{self.add(f'{place}/turns of {self.rank}')}"
        self.add(turn)
        return lambda: self.add(turn, 0) >= self.size

    def _key(self, what: str) -> str:
        return f"adabatch/{self._name}/{what}"


def side_channel_of_run(ranks: Collectives) -> SideChannel | None:
    """A channel of its own for each run of some ranks, all of which call this as often.

    Returns:
        None if there is one rank, if they come and go, or if their processes share no store.
    """
    if ranks.size == 1 or not ranks.fixed or not _is_shared():
        return None
    group = f"{digest_of(sorted(ranks.members)):x}"
    run = SideChannel(group, ranks.rank, ranks.size).add(f"runs of {ranks.rank}")
    return SideChannel(f"{group}/{run}", ranks.rank, ranks.size)


def _store() -> dist.Store:
    # Not kept: whoever holds the store of the first rank keeps its port in use after the groups were destroyed.
    try:
        return distributed_c10d._get_default_store()
    except ValueError as error:
        raise ChannelClosed from error


def _is_shared() -> bool:
    """Whether the processes have a store in common. Over MPI each has its own."""
    store = _store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return not isinstance(store, dist.HashStore)
