"""Hooks around ``optimizer.step()``: changes to the update by the batch, in force only while it runs."""

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

from adabatch.runtime.optimizers.joined import each_of
from adabatch.runtime.optimizers.ownership import held_weakly, remove_all
from adabatch.runtime.wrappers.backward import left_out


def hook_step(
    optimizer: Optimizer,
    before: Callable[[Optimizer, Callable[[], Any] | None], None],
    after: Callable[[Optimizer], None],
) -> list[RemovableHandle]:
    """Calls ``before`` and ``after`` around ``optimizer.step()``, or around that of each of several; once if steps are
    nested. ``before`` is also given the closure of the call, or None.

    If the ``step()`` of an optimizer calls that of its parent, torch's hooks of both run, one inside the other: only
    the outermost counts. A step that raised an error never runs the hooks after it, and is ignored once it has
    returned.

    If ``before`` and ``after`` are methods, their object is not kept alive, and its hooks are removed when it is
    dropped.

    Raises:
        TypeError: if it is a wrapper that is an ``Optimizer`` by type only.
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
        # Not at exit, when torch may be partly torn down and there is nothing left to clean up for.
        finalize(before.__self__, remove_all, handles).atexit = False
    return handles


def _runs_inside(call: FrameType | None, outer: FrameType | None) -> bool:
    while call is not None and outer is not None:
        if call is outer:
            return True
        call = call.f_back
    return False


class _Around:
    """The hooks of one optimizer, which detect nested steps."""

    # A counter of steps that have begun would stay one too high after a step that raised an error. The frame of the
    # outermost step() is kept instead: the step runs as long as this frame is among the callers.

    def __init__(self, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._before, self._after = held_weakly(before), held_weakly(after)
        self._outermost: FrameType | None = None

    def enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Torch's hook before a step."""
        caller = sys._getframe(1)  # inspect.currentframe() would have to be kept in a variable of the frame itself
        if _runs_inside(caller, self._outermost):
            return
        self._outermost = caller
        before = self._before()
        if before is not None:
            before(optimizer, args[1] if len(args) > 1 else kwargs.get("closure"))

    def leave(self, optimizer: Optimizer, *_: Any) -> None:
        """Torch's hook after a step."""
        caller = sys._getframe(1)  # inspect.currentframe() would have to be kept in a variable of the frame itself
        if caller is not self._outermost and _runs_inside(caller, self._outermost):
            return
        self._outermost = None  # a frame keeps its local variables alive
        after = self._after()
        if after is not None:
            after(optimizer)


def put_setting(group: dict[str, Any], name: str, value: Any) -> None:
    """Writes a setting into a group, in place if it is a tensor, to which capturable optimizers keep a reference."""
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
    """The changes of an update by the batch.

    Args:
        factor: the batch factor on the learning rate.
        settings: other settings of a parameter group -> those of them that change, with their values.
        averaged: a parameter group -> as how many updates of the reference batch size this one counts in Adam's
            averages, if the betas follow the batch; 1 if they do not.
    """

    factor: float
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    averaged: Callable[[Mapping[str, Any]], float] = _once


def host_value(lr: float | Tensor | None) -> float:
    """A rate for the journal; NaN for None, and for a rate on an accelerator, because reading it would stall the
    step."""
    if lr is None:
        return math.nan
    return float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else math.nan


def rates_of(groups: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """The learning rates of parameter groups for the journal: as stored, the base, and their ratio (the shape)."""
    stored = [host_value(group.get("lr")) for group in groups]
    # a schedule of torch keeps the base as initial_lr; without a schedule the rate is its own base
    base = [host_value(group.get("initial_lr", group.get("lr"))) for group in groups]
    shape = [lr / first if first else math.nan for lr, first in zip(stored, base, strict=True)]
    return stored, base, shape


def _counting(optimizer: Optimizer, averaged: Sequence[float]) -> list[tuple[dict[str, Any], float]]:
    """The states that the optimizer is about to step and that count the steps of averages, with one number each.

    Args:
        averaged: as how many updates this one counts, one number per group; states of a group with 1 are left out.
    """
    return [
        (optimizer.state[p], count)
        for group, count in zip(optimizer.param_groups, averaged, strict=True)
        if count != 1.0
        for p in group["params"]
        # An optimizer does not step a parameter without a gradient, and does not count for it either.
        if p.grad is not None and "step" in optimizer.state.get(p, ())
    ]


class _Changes:
    """The changes during an update, and the original values; a separate object, so that it outlives ``StepHooks``."""

    def __init__(self) -> None:
        self._settings: list[tuple[dict[str, Any], str, Any]] = []
        self._counts: list[tuple[dict[str, Any], Any]] = []
        self.handles: list[RemovableHandle] = []

    def put(self, group: dict[str, Any], name: str, value: Any) -> None:
        # A tensor is copied, because put_setting() writes into it.
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
    """Changes the settings of an update by the public hooks around ``optimizer.step()``, and restores them afterwards.

    ``group["lr"]`` and the settings that follow are changed before the update and restored after it, so schedulers,
    checkpoints and logs never store the changed values. If an update raises an error, its hook afterwards does not run;
    everything is then restored before the optimizer's state is saved, before the next update, and by ``restore()``. A
    rate that is one tensor in several groups is changed once.

    Several optimizers make one update, which is complete when each of them has stepped, in any order.

    Adam corrects its averages by ``1 - beta ** step``, which is wrong if beta changes. With ``beta_t = beta ** r_t``
    the right correction is ``1 - beta ** sum(r)``, that is ``1 - beta_t ** (sum(r) / r_t)``. If the betas follow, the
    step count of each parameter's state is therefore the sum of its ``r``, in updates of the reference batch size. In
    this unit it remains right for an optimizer that stepped before, for a parameter that had no gradient in some steps,
    after a resume, and if the run continues with fixed betas. While an update runs it is divided by ``r_t``.

    If the three callables are methods of an object, the object is not kept alive: when it is dropped, everything is
    restored and the hooks are removed.

    Args:
        optimizer: the optimizer, or several (``JoinedOptimizers``).
        overrides: called before each update; returns its changes.
        skip: called before each update; returns whether to leave it out. The gradients are then dropped, so that the
            optimizer has nothing to do.
        done: called after each update with the optimizer, the rates that were in force, one per group, and whether it
            was applied. It was not if ``skip`` returned True, or if a gradient scaler made a fused optimizer skip it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        overrides: Callable[[], StepOverrides],
        skip: Callable[[], bool],
        done: Callable[[Optimizer, list[float], bool], None],
    ) -> None:
        self._optimizer = optimizer
        self._overrides, self._skip, self._done = held_weakly(overrides), held_weakly(skip), held_weakly(done)
        self._changes = changes = _Changes()
        self._came: dict[Optimizer, tuple[list[float], bool]] = {}  # optimizers that have made their part of the update
        self._averaged: list[float] = []  # rates of the groups of the optimizer that is stepping
        self._skipped = False
        changes.handles += hook_step(optimizer, self._before, self._after)
        changes.handles += [one.register_state_dict_pre_hook(changes.restore) for one in each_of(optimizer)]
        finalize(self, changes.remove).atexit = False

    def _before(self, optimizer: Optimizer, _: object) -> None:
        self.restore()
        skip, overrides_of = self._skip(), self._overrides()
        if skip is None or overrides_of is None:
            return
        self._skipped = skip()
        # Gradients are dropped instead of the step being suppressed, because torch's hook cannot suppress it, and an
        # optimizer ignores parameters without a gradient.
        if self._skipped:
            optimizer.zero_grad(set_to_none=True)
        overrides = overrides_of()
        self._averaged = [] if self._skipped else [overrides.averaged(group) for group in optimizer.param_groups]
        tensors: set[int] = set()
        for group in optimizer.param_groups:
            changes = overrides.settings(group)
            # A factor of 1 writes nothing, so that the step is that of a loop without adabatch, to the bit.
            if overrides.factor != 1.0:
                changes["lr"] = group["lr"] * overrides.factor
            for name, value in changes.items():
                if isinstance(group[name], Tensor):
                    if id(group[name]) in tensors:  # torch puts the same tensor lr=torch.tensor(...) into all groups
                        continue
                    tensors.add(id(group[name]))
                self._changes.put(group, name, value)
        if self._averaged:
            # In updates of this size: the optimizer adds one, and reads the result for its bias correction. _after
            # counts in updates of the reference size again, of which this one was `count`.
            for state, count in _counting(optimizer, self._averaged):
                self._changes.put_count(state, state["step"] / count)

    def _after(self, optimizer: Optimizer) -> None:
        # Before restore(), while the rates of this update are still in the groups.
        rates = [host_value(group.get("lr")) for group in optimizer.param_groups]
        if self._averaged:
            # The optimizer has counted this update, so the old counts are not put back but corrected below.
            self._changes.keep_counts()
            for state, count in _counting(optimizer, self._averaged):  # including states that this update created
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
        """Restores the settings, if an update raised an error before they were restored."""
        self._changes.restore()

    def forget(self) -> None:
        """Restores the settings, and discards an update of which only some optimizers have made their part."""
        self.restore()
        self._came.clear()

    def remove(self) -> None:
        """Removes the hooks from the optimizer, and restores settings that are still changed."""
        self._changes.remove()
