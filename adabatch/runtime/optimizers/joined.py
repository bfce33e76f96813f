"""Several optimizers that make one update together, such as Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch.runtime.wrappers.fabric import without_fabric


class JoinedOptimizers(Optimizer):
    """Several optimizers of one model as a single one: their groups, their state, one ``step()`` and one checkpoint.

        optimizer = JoinedOptimizers([Muon(matrices, lr=0.02), AdamW(others, lr=1e-3)])

    ``AdaptiveBatch``, ``ProgressLR`` and ``Checkpoints`` make it from a list. Call ``step()`` of this object, or of
    each of its optimizers, in any order.

    Args:
        optimizers: each with its own parameters.

    Attributes:
        each: the optimizers.

    Raises:
        ValueError: if there is no optimizer, one is given twice, or two hold the same parameter.
        TypeError: if something is not an optimizer.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.each: tuple[Optimizer, ...] = tuple(optimizers)
        if not self.each:
            raise ValueError("optimizers must hold at least one optimizer, got none")
        for one in self.each:
            if not isinstance(one, Optimizer) or isinstance(one, JoinedOptimizers):
                raise TypeError(
                    f"optimizer must be a torch.optim.Optimizer, or a list of several, got a list with "
                    f"{type(one).__name__} in it"
                )
        if len({id(one) for one in self.each}) < len(self.each):
            raise ValueError("an optimizer is given twice: give each one once")
        held = [id(p) for group in self.param_groups for p in group["params"]]
        if len(set(held)) < len(held):
            raise ValueError(
                f"{' and '.join(self.names)} hold the same parameter, which would be updated twice: give each "
                f"parameter to one of them"
            )
        # Torch's constructor is needed for its dictionaries of hooks, not for groups: those are the optimizers' own.
        # A group without parameters, since torch refuses an empty list of groups.
        super().__init__([{"params": []}], {})

    @property
    def names(self) -> list[str]:
        """The names of the optimizers in errors."""
        kinds = [type(one).__name__ for one in self.each]
        return [kind if kinds.count(kind) == 1 else f"{kind} (number {n + 1})" for n, kind in enumerate(kinds)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, one optimizer after the other; the same dictionaries that they hold."""
        # Read at each call, because load_state_dict() of an optimizer puts another list in the place of its groups.
        return [group for one in self.each for group in one.param_groups]

    @param_groups.setter
    def param_groups(self, groups: object) -> None:
        pass  # torch's constructor sets an empty list

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of all, by parameter. To be read: it is a new dictionary at each call."""
        return defaultdict(dict, {p: state for one in self.each for p, state in one.state.items()})

    @state.setter
    def state(self, state: object) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises an error, because it is unknown to which optimizer the group belongs.

        Raises:
            RuntimeError: if the group has parameters; add it to one of the optimizers.
        """
        if param_group["params"]:  # torch's constructor calls this without parameters
            raise RuntimeError(f"add the group to one of the optimizers: {', '.join(self.names)}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps each optimizer once. A closure is called first, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for one in self.each:
            one.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls ``zero_grad`` of each optimizer."""
        for one in self.each:
            one.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Torch's format for one optimizer, with the parameters of all in one numbering, and the optimizers' names."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        start = 0
        for one in self.each:
            # torch numbers the parameters of each optimizer from 0.
            own = one.state_dict()
            state |= {start + place: entry for place, entry in own["state"].items()}
            groups += [{**g, "params": [start + place for place in g["params"]]} for g in own["param_groups"]]
            start += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups, "optimizers": [type(one).__name__ for one in self.each]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Gives each optimizer its part.

        Raises:
            ValueError: if the state belongs to other optimizers, or to the same in another order or with other groups.
        """
        mine = [type(one).__name__ for one in self.each]
        saved = state_dict.get("optimizers", mine)
        if list(saved) != mine:
            raise ValueError(
                f"the state is that of {', '.join(saved)}, but the optimizers are {', '.join(mine)}: give the same "
                f"optimizers in the same order"
            )
        groups = list(state_dict["param_groups"])
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                f"the state has groups of {sizes} parameters, the optimizers have groups of "
                f"{[len(group['params']) for group in self.param_groups]}: build the optimizers as the saving run did"
            )
        start = 0
        for one in self.each:
            own, groups = groups[: len(one.param_groups)], groups[len(one.param_groups) :]
            end = start + sum(len(group["params"]) for group in own)
            one.load_state_dict(
                {
                    "state": {p - start: entry for p, entry in state_dict["state"].items() if start <= p < end},
                    "param_groups": [{**g, "params": [p - start for p in g["params"]]} for g in own],
                }
            )
            start = end

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "each": self.each}

    def __repr__(self) -> str:
        return f"JoinedOptimizers({list(self.each)!r})"


def joined(optimizer: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """One optimizer for a single one, a list or a tuple; without the wrapper of Lightning's Fabric.

    Raises:
        ValueError, TypeError: as ``JoinedOptimizers`` does.
    """
    if isinstance(optimizer, list | tuple):
        inner: list[Optimizer] = [without_fabric(one) for one in optimizer]
        return inner[0] if len(inner) == 1 else JoinedOptimizers(inner)
    whole: Optimizer = without_fabric(optimizer)  # the caller checks that it is an optimizer
    return whole


def each_of(optimizer: Optimizer) -> Sequence[Optimizer]:
    """The optimizers whose ``step()`` makes the update."""
    return optimizer.each if isinstance(optimizer, JoinedOptimizers) else (optimizer,)


def kind_of(optimizer: Optimizer) -> str:
    """The name of an optimizer: its class, or those of several."""
    return " and ".join(type(one).__name__ for one in each_of(optimizer))


def same_groups(one: Optimizer, other: Optimizer) -> bool:
    """Whether two objects step the same optimizer: a wrapper and one of several joined ones hold its very groups."""
    return bool({id(group) for group in one.param_groups} & {id(group) for group in other.param_groups})


def weight_versions(optimizer: Optimizer) -> list[int]:
    """Torch's count of changes of the first trained parameter of each group; reading it needs no device."""
    firsts = (next((p for p in group["params"] if p.requires_grad), None) for group in optimizer.param_groups)
    return [p._version for p in firsts if p is not None]


def without_rate(optimizer: Optimizer) -> str | None:
    """The class of an optimizer that sets its learning rate itself (``lr=None``); None if all have a rate."""
    for one in each_of(optimizer):
        if any(group.get("lr") is None for group in one.param_groups):
            return type(one).__name__
    return None
