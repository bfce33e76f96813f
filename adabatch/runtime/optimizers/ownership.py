"""One owner per optimizer and model: a new object of a kind replaces its predecessor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, WeakKeyDictionary, WeakMethod, ref

from torch.utils.hooks import RemovableHandle


class HookOwner(Protocol):
    """An object that has put hooks on an optimizer or a model."""

    def give_way(self) -> None:
        """A successor is being made: remove every hook, and raise an error that names it when used again."""
        ...


class _Holding(NamedTuple):
    kind: str
    hosts: list[ReferenceType[Any]]


# The only global table of the package. It holds nothing that a run reads, and keeps nothing alive: an owner that is
# dropped disappears from it. An attribute on the user's optimizer or model would be copied and pickled with it, and
# torch's dictionaries of hooks, in which the predecessor could be found too, are private.
_CLAIMS: WeakKeyDictionary[HookOwner, _Holding] = WeakKeyDictionary()


def take_over(owner: HookOwner, hosts: Iterable[object], *, kind: str) -> None:
    """Makes ``owner`` the only one of its kind on its hosts; earlier owners give way first.

    Args:
        owner: has a hook on each of the hosts, or is about to add one.
        hosts: optimizers, parameters or modules, compared by identity.
        kind: owners of different kinds may share a host.
    """
    mine = list({id(host): host for host in hosts}.values())
    displace(mine, kind=kind, but=owner)
    _CLAIMS[owner] = _Holding(kind, [ref(host) for host in mine])


def displace(hosts: Iterable[object], *, kind: str, but: HookOwner | None = None) -> bool:
    """Asks the owners of a kind that have one of the hosts to give way.

    Args:
        hosts: optimizers, parameters or modules, compared by identity.
        kind: of the owners.
        but: an owner that stays.

    Returns:
        Whether there were any.
    """
    found = [owner for owner in owners_of(hosts, kind=kind) if owner is not but]
    for owner in found:
        del _CLAIMS[owner]
        owner.give_way()
    return bool(found)


def owners_of(hosts: Iterable[object], *, kind: str) -> list[HookOwner]:
    """The owners of a kind that have one of the hosts."""
    # id() of a dead reference is that of None, which is never a host.
    ids = {id(host) for host in hosts}
    return [
        owner
        for owner, claim in list(_CLAIMS.items())
        if claim.kind == kind and any(id(host()) in ids for host in claim.hosts)
    ]


def release(owner: HookOwner) -> None:
    """Removes ``owner`` from the table without asking it to give way: its hooks are off, or were never on."""
    _CLAIMS.pop(owner, None)


@contextmanager
def undone_on_error() -> Iterator[ExitStack]:
    """A stack whose callbacks run if the block raises, the last one first, and are dropped otherwise."""
    undo = ExitStack()
    try:
        yield undo
    except BaseException:
        undo.close()
        raise


def remove_all(handles: list[RemovableHandle]) -> None:
    """Takes hooks off, and empties the list."""
    while handles:
        handles.pop().remove()


def held_weakly(call: Callable[..., Any]) -> Callable[[], Callable[..., Any] | None]:
    """A weak reference to a method, which gives None after its object was dropped; other callables are kept."""
    # a method's object is held by its user; a function has nobody else to hold it
    return WeakMethod(call) if isinstance(call, MethodType) else lambda: call


def called_weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that calls a method without keeping its object alive; it does nothing after the object was dropped."""
    held = held_weakly(method)

    def hook(*arguments: Any) -> Any:
        call = held()
        return None if call is None else call(*arguments)

    return hook
