"""What happens around ``optimizer.step()``: the batch's changes to the update, on while it runs and off after."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, MethodType
from typing import Any, NamedTuple
from weakref import finalize

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adabatch.runtime.engines.backward import left_out
from adabatch.runtime.optimizers import each_of
from adabatch.runtime.ownership import held_weakly, remove_all


def hook_step(
    optimizer: Optimizer, before: Callable[[Optimizer], None], after: Callable[[Optimizer], None]
) -> list[RemovableHandle]:
    """Calls around ``optimizer.step()``, or around that of each of several; once for steps that run inside each other.

    An optimizer whose ``step()`` calls its parent's runs torch's hooks of both, one inside the other: the outermost
    counts. One that raised never runs those after it, and counts no more once it is left.

    Where ``before`` and ``after`` are methods, their object is not kept alive, and its hooks go when it is dropped.

    Raises:
        TypeError: a wrapper that is an ``Optimizer`` by type only.
    """
    handles: list[RemovableHandle] = []
    for one in each_of(optimizer):
        around = _Around(before, after)
        try:
            handles += [one.register_step_pre_hook(around.enter), one.register_step_post_hook(around.leave)]
        except AttributeError as error:  # such as Accelerate's
            remove_all(handles)
            raise TypeError(
                f"{type(one).__name__} is not an optimizer with step hooks: give the optimizer inside it, before it is "
                f"wrapped (with Accelerate, before accelerator.prepare; or give it to "
                f"adabatch.integrations.accelerate.attach, and take the `optimizer` of what that returns)"
            ) from error
    if isinstance(before, MethodType):
        finalize(before.__self__, remove_all, handles).atexit = False
    return handles


def _runs_inside(call: FrameType | None, outer: FrameType | None) -> bool:
    while call is not None and outer is not None:
        if call is outer:
            return True
        call = call.f_back
    return False


class _Around:
    """The hooks of one optimizer, which know whether a step runs inside another one.

    A count of the steps begun would not do: it is one too high for ever after a step that raised. What is kept is the
    call of ``step()`` itself: it runs as long as it is among the callers.
    """

    def __init__(self, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._before, self._after = held_weakly(before), held_weakly(after)
        self._outermost: FrameType | None = None

    def enter(self, optimizer: Optimizer, *_: Any) -> None:
        """Torch's hook before a step."""
        caller = sys._getframe(1)  # inspect.currentframe() would have to be kept in a variable of the frame itself
        if _runs_inside(caller, self._outermost):
            return
        self._outermost = caller
        before = self._before()
        if before is not None:
            before(optimizer)

    def leave(self, optimizer: Optimizer, *_: Any) -> None:
        """Torch's hook after a step."""
        caller = sys._getframe(1)  # inspect.currentframe() would have to be kept in a variable of the frame itself
        if caller is not self._outermost and _runs_inside(caller, self._outermost):
            return
        self._outermost = None  # frames keep what they worked on
        after = self._after()
        if after is not None:
            after(optimizer)


def put_setting(group: dict[str, Any], name: str, value: Any) -> None:
    """Writes a setting into a group, in place where it is a tensor (capturable optimizers hold on to it)."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _nothing(group: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _once(group: Mapping[str, Any]) -> float:
    return 1.0


class StepOverrides(NamedTuple):
    """What the batch changes about an update.

    Args:
        factor: the batch factor on the learning rate.
        settings: other settings of a parameter group -> those of them that change, with their values.
        averaged: a parameter group -> updates of the reference batch size that this one counts as in the memory of
            Adam's averages, where the betas follow the batch; 1 where they do not.
    """

    factor: float
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    averaged: Callable[[Mapping[str, Any]], float] = _once


def host_value(lr: float | Tensor | None) -> float:
    """A rate for the journal; NaN for none, and for one on an accelerator, as reading it would stall the step."""
    if lr is None:
        return math.nan
    return float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else math.nan


def _counting(optimizer: Optimizer, averaged: Sequence[float]) -> list[tuple[dict[str, Any], float]]:
    """The states that the optimizer is about to step, of those that count the steps of averages, with a number each.

    Args:
        averaged: as how many updates this one counts, one number per group; states of a group with 1 are left out.
    """
    return [
        (optimizer.state[p], count)
        for group, count in zip(optimizer.param_groups, averaged, strict=True)
        if count != 1.0
        for p in group["params"]
        if p.grad is not None and "step" in optimizer.state.get(p, ())
    ]


class _Changes:
    """What is changed while an update runs, and how it was; kept apart, so that it outlives whoever changed it."""

    def __init__(self) -> None:
        self._settings: list[tuple[dict[str, Any], str, Any]] = []
        self._counts: list[tuple[dict[str, Any], Any]] = []
        self.handles: list[RemovableHandle] = []

    def put(self, group: dict[str, Any], name: str, value: Any) -> None:
        self._settings.append((group, name, _copy(group[name])))
        put_setting(group, name, value)

    def put_count(self, state: dict[str, Any], value: Any) -> None:
        self._counts.append((state, _copy(state["step"])))
        put_setting(state, "step", value)

    def keep_counts(self) -> None:
        self._counts.clear()

    def restore(self, *_: Any) -> None:
        for group, name, value in self._settings:
            put_setting(group, name, value)
        self._settings.clear()
        for state, count in self._counts:
            put_setting(state, "step", count)
        self._counts.clear()

    def remove(self) -> None:
        self.restore()
        remove_all(self.handles)


class StepHooks:
    """What happens around ``optimizer.step()``, by its public hooks: what the batch moves is moved while it runs only.

    ``group["lr"]`` and what follows with it are changed before and put back after, so no scheduler, checkpoint or log
    ever stores them. An update that raises runs no hook after it; all is then put back before the optimizer's state is
    saved, before the next update, and at ``restore()``. A rate that is one tensor in several groups is changed once.

    Several optimizers make one update, which is done when each of them has stepped, in any order.

    Adam corrects its averages by ``1 - beta ** step``, which is wrong once beta changes. With ``beta_t = beta ** r_t``
    the right correction is ``1 - beta ** sum(r)``, that is ``1 - beta_t ** (sum(r) / r_t)``. So where the betas follow,
    the step count of each parameter's state is the sum of its ``r``: updates of the reference batch size, in which it
    stays right for an optimizer that stepped before, for a parameter that sat out, after a resume, and for a run that
    goes on with fixed betas. While an update runs it is divided by ``r_t``.

    Where the three calls are methods of an object, it is not kept alive: once it is dropped all is put back and the
    hooks are gone.

    Args:
        optimizer: the optimizer, or several (``JoinedOptimizers``).
        moved: called before each update.
        skip: called before each update, says whether to leave it out: the gradients are dropped, so that the optimizer
            finds nothing to do.
        done: called after each update with the optimizer, the rates that were in force, one a group, and whether it was
            applied, which it is not where ``skip`` said so, or a gradient scaler to a fused optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        moved: Callable[[], StepOverrides],
        skip: Callable[[], bool],
        done: Callable[[Optimizer, list[float], bool], None],
    ) -> None:
        self._optimizer = optimizer
        self._moved, self._skip, self._done = held_weakly(moved), held_weakly(skip), held_weakly(done)
        self._changes = changes = _Changes()
        self._came: dict[Optimizer, tuple[list[float], bool]] = {}  # optimizers that made their part of the update
        self._averaged: list[float] = []  # of the groups of the optimizer that is stepping
        self._skipped = False
        changes.handles += hook_step(optimizer, self._before, self._after)
        changes.handles += [one.register_state_dict_pre_hook(changes.restore) for one in each_of(optimizer)]
        finalize(self, changes.remove).atexit = False

    def _before(self, optimizer: Optimizer) -> None:
        self.restore()
        skip, overrides = self._skip(), self._moved()
        if skip is None or overrides is None:
            return
        self._skipped = skip()
        if self._skipped:
            optimizer.zero_grad(set_to_none=True)
        moved = overrides()
        self._averaged = [] if self._skipped else [moved.averaged(group) for group in optimizer.param_groups]
        tensors: set[int] = set()
        for group in optimizer.param_groups:
            changes = moved.settings(group)
            if moved.factor != 1.0:
                changes["lr"] = group["lr"] * moved.factor
            for name, value in changes.items():
                if isinstance(group[name], Tensor):
                    if id(group[name]) in tensors:  # torch gives lr=torch.tensor(...) to all groups
                        continue
                    tensors.add(id(group[name]))
                self._changes.put(group, name, value)
        if self._averaged:
            for state, count in _counting(optimizer, self._averaged):  # the optimizer adds one before it reads
                self._changes.put_count(state, state["step"] / count)

    def _after(self, optimizer: Optimizer) -> None:
        rates = [host_value(group.get("lr")) for group in optimizer.param_groups]
        if self._averaged:
            self._changes.keep_counts()
            for state, count in _counting(optimizer, self._averaged):  # among them those that this update began
                put_setting(state, "step", state["step"] * count)
        self._averaged = []
        self.restore()
        self._came[optimizer] = (rates, not self._skipped and not left_out(optimizer))
        parts = each_of(self._optimizer)
        done = self._done()
        if len(self._came) == len(parts) and done is not None:
            came = [self._came[one] for one in parts]
            self._came.clear()
            done(self._optimizer, [rate for rates, _ in came for rate in rates], all(applied for _, applied in came))

    @property
    def missing(self) -> list[str]:
        """The classes of the optimizers that have not made their part of the update yet."""
        return [type(one).__name__ for one in each_of(self._optimizer) if one not in self._came]

    def restore(self, *_: Any) -> None:
        """Puts back what the batch moved, where an update raised before it could be."""
        self._changes.restore()

    def forget(self) -> None:
        """Puts all back, and forgets an update of which some optimizers only made their part."""
        self.restore()
        self._came.clear()

    def remove(self) -> None:
        """Takes the hooks off the optimizer, and a factor that is still on."""
        self._changes.remove()
