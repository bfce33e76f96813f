"""What happens around ``optimizer.step()``: the batch's changes to the update, on while it runs and off after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adabatch.runtime.engines.backward import left_out


def hook_step(optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> list[RemovableHandle]:
    """Calls around ``optimizer.step()``."""
    try:
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    except AttributeError as error:  # a wrapper that is an Optimizer by type only, such as Accelerate's
        raise TypeError(
            f"{type(optimizer).__name__} is no optimizer with step hooks: give the optimizer inside it, before it is "
            f"wrapped (with Accelerate, before accelerator.prepare)"
        ) from error


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


def host_value(lr: float | Tensor) -> float:
    """A rate for the journal; NaN for one that lives on an accelerator, as reading it would stall the step."""
    return float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else math.nan


def _counting(optimizer: Optimizer, averaged: Sequence[float]) -> list[tuple[dict[str, Any], float]]:
    """The states that the optimizer is about to step, of those that count their steps, with the number of their group.

    Args:
        averaged: as how many updates this one counts, one number a group; states of a group with 1 are left out.
    """
    return [
        (optimizer.state[p], count)
        for group, count in zip(optimizer.param_groups, averaged, strict=True)
        if count != 1.0
        for p in group["params"]
        if p.grad is not None and "step" in optimizer.state.get(p, ())
    ]


class StepHooks:
    """What happens around ``optimizer.step()``, by its public hooks: what the batch moves is moved while it runs only.

    ``group["lr"]`` and what follows with it are changed before and put back after, so no scheduler, checkpoint or log
    ever stores them. An update that raises runs no hook after it; all is then put back before the optimizer's state is
    saved, before the next update, and at ``restore()``.

    Adam corrects its averages by ``1 - beta ** step``, which is wrong once beta changes. With ``beta_t = beta ** r_t``
    the right correction is ``1 - beta ** sum(r)``, that is ``1 - beta_t ** (sum(r) / r_t)``. So where the betas follow,
    the step count of each parameter's state is the sum of its ``r``: updates of the reference batch size, in which it
    stays right for an optimizer that stepped before, for a parameter that sat out, after a resume, and for a run that
    goes on with fixed betas. While an update runs it is divided by ``r_t``.

    Args:
        optimizer: the optimizer.
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
        self._moved = moved
        self._skip = skip
        self._done = done
        self._stored: list[tuple[dict[str, Any], str, Any]] = []
        self._averaged: list[float] = []
        self._counts: list[tuple[dict[str, Any], Any]] = []
        self._skipped = False
        self._handles = [
            *hook_step(optimizer, self._before, self._after),
            optimizer.register_state_dict_pre_hook(self.restore),
        ]

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self.restore()
        self._skipped = self._skip()
        if self._skipped:
            optimizer.zero_grad(set_to_none=True)
        moved = self._moved()
        self._averaged = [moved.averaged(group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            changes = moved.settings(group)
            if moved.factor != 1.0:
                changes["lr"] = group["lr"] * moved.factor
            for name, value in changes.items():
                self._stored.append((group, name, _copy(group[name])))
                put_setting(group, name, value)
        if not self._skipped:
            for state, count in _counting(optimizer, self._averaged):
                self._counts.append((state, _copy(state["step"])))
                put_setting(state, "step", state["step"] / count)  # the optimizer adds one before it reads

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        rates = [host_value(group["lr"]) for group in optimizer.param_groups]
        if self._averaged and not self._skipped:
            self._counts.clear()
            for state, count in _counting(optimizer, self._averaged):  # among them those that this update began
                put_setting(state, "step", state["step"] * count)
        self._averaged = []
        self.restore()
        self._done(optimizer, rates, not self._skipped and not left_out(optimizer))

    def restore(self, *_: Any) -> None:
        """Puts back what the batch moved, where an update raised before it could be."""
        for group, name, value in self._stored:
            put_setting(group, name, value)
        self._stored.clear()
        for state, count in self._counts:
            put_setting(state, "step", count)
        self._counts.clear()

    def remove(self) -> None:
        """Takes the hooks off the optimizer, and a factor that is still on."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
