"""Checks that the trained parameters are still those for which a run was set up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adabatch.arguments import some
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.runtime.wrappers.fsdp2 import is_sharded


def held_parameters(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """The model's parameters that require a gradient and that the optimizer holds.

    Raises:
        ValueError: if there is none.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [p for p in model.parameters() if p.requires_grad and id(p) in held]
    if not found:
        raise ValueError(
            f"the optimizer holds none of the model's parameters that require a gradient: build the "
            f"{type(optimizer).__name__} from the parameters() of this {type(model).__name__}"
        )
    return found


class TrainedParameters:
    """The parameters that require a gradient and are updated, as they were when this was made.

    Probes and engines look for them once. A layer that is unfrozen, frozen, replaced or added to the optimizer during
    the run would be measured, averaged or reduced wrongly from then on, without any error.

    A check walks over the modules, without any operation on a tensor.

    Args:
        model: as it is trained.
        optimizer: whose parameters are updated.
        all_of_model: whether all parameters that require a gradient count, whichever optimizer updates them: for probes
            of the whole model, and for engines whose optimizers hold other tensors.
        waits_for_all: whether the ranks wait for the gradients of all parameters that require one, whichever optimizer
            updates them. One of the others that no longer requires a gradient is then a change, too.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, all_of_model: bool = False, waits_for_all: bool = False
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._all = all_of_model
        # While a module runs, FSDP2 replaces its shards by whole parameters; those of the optimizer stay the same.
        self._sharded = is_sharded(model)
        self._in_ddp = isinstance(uncompiled(model), DistributedDataParallel)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._then = self._now()  # kept alive, so that their ids cannot be reused for other parameters
        then = {id(p) for p in self._then}
        self._others = [p for p in model.parameters() if waits_for_all and p.requires_grad and id(p) not in then]

    def _now(self) -> list[Tensor]:
        if self._sharded:
            return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return [p for p in self._model.parameters() if p.requires_grad and (self._all or id(p) in held)]

    def check(self, what: str) -> None:
        """Checks that they are the same as at the beginning.

        Args:
            what: the class of the object that was set up for them, for the message.

        Raises:
            RuntimeError: if parameters were added or removed; names them and the way out.
        """
        changes = self.changes(what)
        if changes is not None:
            raise RuntimeError(changes)

    def changes(self, what: str) -> str | None:
        """The message of ``check``; None if they are the same as at the beginning."""
        now = self._now()
        gone = self._gone() if self._others else []
        # by identity: tensors compare by value, which would read the device
        if not gone and len(now) == len(self._then) and all(a is b for a, b in zip(now, self._then, strict=True)):
            return None
        before, after = {id(p) for p in self._then}, {id(p) for p in now}
        # The present names last, in case a new parameter has the id of one that is gone.
        names = {**self._names, **{id(p): name for name, p in self._model.named_parameters()}}
        new = [p for p in now if id(p) not in before]
        left = [p for p in self._then if id(p) not in after] + [p for p in gone if id(p) not in after]
        joined = [names.get(id(p), "one outside the model") for p in new]
        lost = [self._names.get(id(p), "one outside the model") for p in left]
        changes = [f"{some(which)} {verb}" for which, verb in ((joined, "joined"), (lost, "left")) if which]
        # DDP reduces what required a gradient when it was built, whether the optimizer holds it or not.
        reduced, there = {id(p) for p in self._others}, {id(p) for p in self._model.parameters() if p.requires_grad}
        rewrap = self._in_ddp and (any(id(p) not in reduced for p in new) or any(id(p) not in there for p in left))
        first = "wrap the model in DistributedDataParallel again, " if rewrap else ""
        return (
            f"the parameters that train are not those that this {what} was made for "
            f"({' and '.join(changes) or 'their order changed'}): {first}make a new {what} on the same optimizer and "
            f"load the state_dict() of this one into it"
        )

    def _gone(self) -> list[Tensor]:
        """The others that no longer require a gradient, or are no longer in the model."""
        # FSDP2 shows whole parameters in their place while a module runs
        there = None if self._sharded else {id(p) for p in self._model.parameters()}
        return [p for p in self._others if not p.requires_grad or (there is not None and id(p) not in there)]

    def flags(self) -> list[tuple[Tensor, bool]]:
        """The parameters that require a gradient now and did not at the beginning, or the reverse; each with its flag
        now."""
        before = [*self._then, *self._others]
        ids = {id(p) for p in before}
        return [(p, False) for p in before if not p.requires_grad] + [
            (p, True) for p in self._now() if id(p) not in ids
        ]

    def put_back(self) -> list[tuple[Tensor, bool]]:
        """Lets those parameters require a gradient that did at the beginning, and no others.

        Returns:
            the parameters that this has changed, each with its flag before.
        """
        changed = self.flags()
        for parameter, flag in changed:
            parameter.requires_grad_(not flag)
        return changed

    @contextmanager
    def zero(self) -> Iterator[Tensor]:
        """A loss of zero through the parameters as they were, in whose backward each has a gradient again, of zero.

        Ranks whose parameters did not change wait for all of these gradients.
        """
        # DDP waits for all parameters that required a gradient when it was built, including those frozen since and
        # those that the optimizer does not hold.
        waited = [*self._then, *self._others]
        frozen = [p for p in waited if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        try:
            yield torch.stack([(p * 0).sum() for p in waited]).sum()
        finally:
            for p in frozen:
                p.requires_grad_(False)


def raise_first(own: str | None, collectives: Collectives) -> NoReturn:
    """Raises an error on all ranks, of which at least one has a message of its own; the others get the first of these.

    Raises:
        RuntimeError: always.
    """
    rank, message = collectives.first_message(own)
    raise RuntimeError(own or f"on rank {rank}, {message}")
