"""One owner for each optimizer and model: a new object of a kind takes the place of its predecessor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, WeakKeyDictionary, WeakMethod, ref

from torch.utils.hooks import RemovableHandle


class Owner(Protocol):
    """Something that has put hooks on an optimizer or a model."""

    def give_way(self) -> None:
        """A successor is being made: take every hook off, and raise by name when used again."""
        ...


class _Claim(NamedTuple):
    kind: str
    hosts: list[ReferenceType[Any]]


# The one table of the package that outlives a call. It holds nothing that a run reads, and keeps nothing alive: an
# owner that is dropped is gone from it. An attribute on the user's optimizer or model would travel with its copies and
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


def release(owner: Owner) -> None:
    """Forgets what ``owner`` has taken over, without asking it to give way: for a constructor that fails."""
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
    """A method without its object, None once that is gone; any other callable as it is."""
    return WeakMethod(call) if isinstance(call, MethodType) else lambda: call


def called_weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that calls a method without keeping its object alive; it does nothing once that is gone."""
    held = held_weakly(method)

    def hook(*arguments: Any) -> Any:
        call = held()
        return None if call is None else call(*arguments)

    return hook
