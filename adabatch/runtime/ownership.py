"""One owner for each optimizer and model: a new object of a kind takes the place of its predecessor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref


class Owner(Protocol):
    """Something that has put hooks on an optimizer or a model."""

    def give_way(self) -> None:
        """A successor is being made: take every hook off, and raise by name when used again."""
        ...


class _Claim(NamedTuple):
    kind: str
    hosts: list[ReferenceType[Any]]


# The one table of the package that outlives a call. It holds nothing that a run reads, and keeps nothing alive: an owner
# that is dropped is gone from it. An attribute on the user's optimizer or model would travel with its copies and
# pickles, and torch's dictionaries of hooks, where the predecessor could be found too, are private.
_CLAIMS: WeakKeyDictionary[Owner, _Claim] = WeakKeyDictionary()


def take_over(owner: Owner, hosts: Iterable[object], *, kind: str) -> None:
    """Makes ``owner`` the only one of its kind on its hosts; those before it give way first.

    Args:
        owner: has a hook on each of the hosts, or is about to put one there.
        hosts: optimizers, parameters or modules, told apart by identity.
        kind: owners of different kinds live side by side.
    """
    mine = {id(host): host for host in hosts}
    for other, claim in list(_CLAIMS.items()):
        if other is not owner and claim.kind == kind and any(id(host()) in mine for host in claim.hosts):
            del _CLAIMS[other]
            other.give_way()
    _CLAIMS[owner] = _Claim(kind, [ref(host) for host in mine.values()])
