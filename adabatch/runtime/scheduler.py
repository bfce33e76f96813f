"""The learning rate of a run: a torch ``LRScheduler`` driven by progress, and the batch factor put on step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from adabatch.batch.plan import Duration, Progress, Unit
from adabatch.lr.clock import Anchor, Clock
from adabatch.lr.shapes import Shape, warmup_factor
from adabatch.runtime.backward import left_out

STATE_FORMAT = 1

ClockKind = Literal["total", "gain"]


class ProgressSource(Protocol):
    """Where a schedule reads how far the run is; ``AdaptiveBatch`` is one."""

    @property
    def progress(self) -> Progress:
        """What the applied updates consumed so far."""
        ...

    @property
    def progress_after_next(self) -> Progress:
        """The same, one step later."""
        ...

    @property
    def lr_factor(self) -> float:
        """The batch factor of the next update."""
        ...


@runtime_checkable
class GrowthHold(ProgressSource, Protocol):
    """A source whose batch may wait for the warm-up; ``AdaptiveBatch`` is one."""

    def hold_growth_until(self, duration: Duration | None) -> None:
        """Lets the batch not grow before so much of the run is over."""
        ...


def _hook(optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> list[RemovableHandle]:
    """Calls around ``optimizer.step()``."""
    try:
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    except AttributeError as error:  # a wrapper that is an Optimizer by type only, such as Accelerate's
        raise TypeError(
            f"{type(optimizer).__name__} is no optimizer with step hooks: give the optimizer inside it, before it is "
            f"wrapped (with Accelerate, before accelerator.prepare)"
        ) from error


class CountedSteps:
    """A progress source for runs without ``AdaptiveBatch``: it counts the optimizer's steps, and nothing else."""

    lr_factor = 1.0

    def __init__(self) -> None:
        self.progress = Progress()
        self._stepping = False

    def listen(self, optimizer: Optimizer) -> None:
        """Counts the steps of ``optimizer`` from now on; a copy of it has no hooks, and must be listened to anew."""
        _hook(optimizer, self._begin, self._count)

    def _begin(self, *_: Any) -> None:
        self._stepping = True

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        # An optimizer whose step() calls its parent's runs the hooks of both, one inside the other.
        if self._stepping and not left_out(optimizer):
            self.progress = self.progress.after(0)
        self._stepping = False

    @property
    def progress_after_next(self) -> Progress:
        """One step later."""
        return self.progress.after(0)


class ProgressLR(LRScheduler):
    """``base LR x shape(progress)``, with progress in examples, tokens or steps: a torch ``LRScheduler``.

    Call ``step()`` after ``optimizer.step()``, as with any scheduler. It reads progress rather than counting calls, so
    calling it twice, or after an update that was skipped, changes nothing. The batch factor is not in
    ``group["lr"]``; ``get_last_lr`` includes it.

    Args:
        optimizer: its groups keep their own base LRs.
        shape: progress in [0, 1] -> factor, from ``adabatch.lr``.
        source: where progress comes from, an ``AdaptiveBatch``; None counts optimizer steps.
        total: length of the run.
        warmup: length of a linear warm-up before the shape, in any unit; the shape runs over the rest.
        warmup_start: factor that the warm-up starts from, in [0, 1]. The first update is already one step past it.
        clock: "total" counts progress in the unit of the total. "gain" counts gain-steps towards a total in any unit:
            each step advances the shape by what it is worth, and no number of steps need be known.

    Raises:
        ValueError: a total of no length, a warm-up not shorter than the total, a total in examples or tokens where
            nobody counts those, or a learning rate that is not finite.
        TypeError: a shape that is not a ``Shape``, or a length without a unit.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shape: Shape,
        source: ProgressSource | None = None,
        *,
        total: Duration,
        warmup: Duration | None = None,
        warmup_start: float = 0.0,
        clock: ClockKind = "total",
    ) -> None:
        if not isinstance(shape, Shape):
            raise TypeError(f"shape must come from adabatch.lr, such as adabatch.lr.cosine(), got {shape!r}")
        for name, length in (("total", total), ("warmup", warmup)):
            if not isinstance(length, Duration) and (length is not None or name == "total"):
                raise TypeError(f"{name} must be a duration, such as adabatch.steps({length}), got {length!r}")
        if not 0 <= warmup_start <= 1:
            raise ValueError(f"warmup_start must be in [0, 1], got {warmup_start}")
        if clock not in get_args(ClockKind):
            raise ValueError(f"clock must be one of {', '.join(get_args(ClockKind))}, got {clock!r}")
        for group in optimizer.param_groups if isinstance(optimizer, Optimizer) else ():  # torch names what is none
            if not math.isfinite(group["lr"]):  # its optimizers take NaN
                raise ValueError(f"the learning rate of {type(optimizer).__name__} must be finite, got {group['lr']}")
        self.shape = shape
        self._clock = Clock(total, warmup)
        self._warmup_start = warmup_start
        self._kind: ClockKind = clock
        self._anchor: Anchor | None = None
        self._passed = 0.0
        counted = CountedSteps()
        self._source: ProgressSource = counted if source is None else source
        for length in (total, warmup):
            if length is not None:
                self._check_unit(length.unit, f"{length} cannot be counted")
        if clock == "gain":
            self._check_unit("gain_steps", "clock='gain' cannot be read")
        if source is None:
            counted.listen(optimizer)
        if warmup is not None and isinstance(source, GrowthHold):
            source.hold_growth_until(warmup)
        super().__init__(optimizer)

    def _check_unit(self, unit: Unit, refused: str) -> None:
        if unit != "steps" and isinstance(self._source, CountedSteps):
            raise ValueError(f"{refused} without an AdaptiveBatch: pass it as the third argument")
        self._source.progress_after_next.count(unit)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled or copied: its optimizer has come along, without the hooks."""
        self.__dict__.update(state)
        if isinstance(self._source, CountedSteps):
            self._source.listen(self.optimizer)

    def factor(self) -> float:
        """``warm-up x shape`` for the next update."""
        clock, progress = self._clock, self._source.progress
        if clock.warming_up(progress):
            ramp = warmup_factor(clock.warmup_fraction(self._source.progress_after_next), start=self._warmup_start)
            return ramp * float(self.shape(0.0))
        return float(self.shape(self._fraction()))

    def _fraction(self) -> float:
        """Progress of the shape, after the warm-up; does not step back."""
        clock, progress = self._clock, self._source.progress
        if self._kind == "total":
            if self._anchor is None:
                self._anchor = clock.anchor(progress)
            return clock.fraction(progress, self._anchor)
        after, unit = self._source.progress_after_next, clock.total.unit
        gain = after.count("gain_steps") - progress.count("gain_steps")
        gain_per_unit = gain / (after.count(unit) - progress.count(unit))
        if self._anchor is None:
            self._anchor = clock.anchor(progress, gain_per_unit)
        self._passed = clock.gain_fraction(progress, gain_per_unit, self._anchor, self._passed)
        return self._passed

    def set_total(self, total: Duration) -> None:
        """Changes the length of a run under way. The rate does not jump: what is left of the shape takes what is left.

        A run whose shape is over stays at its end; to extend it, see ``lr.two_stage`` and ``lr.longer_cooldown``. A run
        that is resumed after this is built with the new total.

        Raises:
            TypeError: a total without a unit.
            ValueError: a total that is already over, not longer than a warm-up under way, or in a unit that nobody
                counts.
        """
        if not isinstance(total, Duration):
            raise TypeError(f"total must be a duration, such as adabatch.steps({total}), got {total!r}")
        self._check_unit(total.unit, f"{total} cannot be counted")
        if self._source.progress.reached(total):
            raise ValueError(f"the run is already past {total}: give a total that lies ahead")
        clock = Clock(total, self._clock.warmup)
        progress = self._source.progress
        if not self._clock.warming_up(progress):
            fraction = self._fraction()
            self._anchor = Anchor(progress.count(total.unit), fraction, progress.gain_steps or 0.0)
            self._passed = fraction
        self._clock = clock
        self._write()

    def step(self, epoch: int | None = None) -> None:
        """Writes the rates of the next update: after ``optimizer.step()``, or where a step was left without one."""
        # torch warns of a first call without an update before it, which is what a gradient scaler makes on overflow,
        # and loses a rate by counting calls. Progress is read here, not counted.
        self._step_count += self._step_count == 1
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """``base LR x warm-up x shape`` of each group."""
        factor = self.factor()
        return [base * factor for base in self.base_lrs]

    def get_last_lr(self) -> list[float | Tensor]:
        """What ``optimizer.step()`` applies next to each group: the groups' rates times the batch factor."""
        factor = self._source.lr_factor
        return [lr * factor for lr in super().get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Base LRs, shape and lengths as plain data, and where the shape started."""
        warmup = self._clock.warmup
        total = self._clock.total
        return {
            "format": STATE_FORMAT,
            "base_lrs": [float(base) for base in self.base_lrs],
            "shape": self.shape.to_dict(),
            "total": [total.count, str(total.unit)],
            "warmup": None if warmup is None else [warmup.count, warmup.unit],
            "warmup_start": self._warmup_start,
            "clock": self._kind,
            "anchor": None if self._anchor is None else [*astuple(self._anchor)],
            "passed": self._passed,
            "last_epoch": self.last_epoch,
            "steps": self._source.progress.steps if isinstance(self._source, CountedSteps) else None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the schedule and writes the right rates into the groups.

        Load the ``AdaptiveBatch`` first: the rates depend on its progress.

        Raises:
            ValueError: a newer format, another number of groups, or another shape, total or warm-up than was saved.
        """
        if state_dict["format"] > STATE_FORMAT:
            raise ValueError(
                f"the schedule was saved in format {state_dict['format']}, this version reads up to {STATE_FORMAT}: "
                f"upgrade adabatch"
            )
        if len(state_dict["base_lrs"]) != len(self.base_lrs):
            raise ValueError(
                f"the schedule was saved with {len(state_dict['base_lrs'])} parameter groups, "
                f"the optimizer has {len(self.base_lrs)}: build it as the saved run did"
            )
        mine = self.state_dict()
        saved = Shape.from_dict(state_dict["shape"])
        if saved != self.shape:
            raise ValueError(
                f"the schedule was saved with the shape {saved}, this run has {self.shape}: use one of them"
            )
        for name in ("total", "warmup", "warmup_start", "clock"):
            if state_dict[name] != mine[name]:
                raise ValueError(
                    f"the schedule was saved with {name}={state_dict[name]}, this run has {mine[name]}: its learning "
                    f"rate would jump; resume with the saved value (and change the total afterwards with set_total)"
                )
        for group, base in zip(self.optimizer.param_groups, state_dict["base_lrs"], strict=True):
            group["initial_lr"] = base
        self.base_lrs = list(state_dict["base_lrs"])
        self._anchor = None if state_dict["anchor"] is None else Anchor(*state_dict["anchor"])
        self._passed = state_dict["passed"]
        self.last_epoch = state_dict["last_epoch"]
        if isinstance(self._source, CountedSteps):
            self._source.progress = Progress(steps=state_dict["steps"] or 0)
        self._write()

    def _write(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            _put(group, "lr", lr)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    """Writes a setting into a group, in place where it is a tensor (capturable optimizers hold on to it)."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _nothing(group: Mapping[str, Any]) -> dict[str, Any]:
    return {}


class Moved(NamedTuple):
    """What the batch changes about an update.

    Args:
        factor: the batch factor on the learning rate.
        settings: other settings of a parameter group -> those of them that change, with their values.
        averaged: updates of the reference batch size that this one counts as in the memory of Adam's averages, where
            the betas follow the batch; 1 where they do not.
    """

    factor: float
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    averaged: float = 1.0


def host_value(lr: float | Tensor) -> float:
    """A rate for the journal; NaN for one that lives on an accelerator, as reading it would stall the step."""
    return float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else math.nan


def _counting(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The states that the optimizer is about to step, of those that count their steps."""
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [optimizer.state[p] for p in stepped if "step" in optimizer.state.get(p, ())]


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
        moved: Callable[[], Moved],
        skip: Callable[[], bool],
        done: Callable[[Optimizer, list[float], bool], None],
    ) -> None:
        self._moved = moved
        self._skip = skip
        self._done = done
        self._stored: list[tuple[dict[str, Any], str, Any]] = []
        self._averaged = 1.0
        self._counts: list[tuple[dict[str, Any], Any]] = []
        self._skipped = False
        self._handles = [
            *_hook(optimizer, self._before, self._after),
            optimizer.register_state_dict_pre_hook(self.restore),
        ]

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self.restore()
        self._skipped = self._skip()
        if self._skipped:
            optimizer.zero_grad(set_to_none=True)
        moved = self._moved()
        for group in optimizer.param_groups:
            changes = moved.settings(group)
            if moved.factor != 1.0:
                changes["lr"] = group["lr"] * moved.factor
            for name, value in changes.items():
                self._stored.append((group, name, _copy(group[name])))
                _put(group, name, value)
        self._averaged = moved.averaged
        if moved.averaged != 1.0 and not self._skipped:
            for state in _counting(optimizer):
                self._counts.append((state, _copy(state["step"])))
                _put(state, "step", state["step"] / moved.averaged)  # the optimizer adds one before it reads

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        rates = [host_value(group["lr"]) for group in optimizer.param_groups]
        if self._averaged != 1.0 and not self._skipped:
            self._counts.clear()
            for state in _counting(optimizer):  # among them those that this update began
                _put(state, "step", state["step"] * self._averaged)
        self._averaged = 1.0
        self.restore()
        self._done(optimizer, rates, not self._skipped and not left_out(optimizer))

    def restore(self, *_: Any) -> None:
        """Puts back what the batch moved, where an update raised before it could be."""
        for group, name, value in self._stored:
            _put(group, name, value)
        self._stored.clear()
        for state, count in self._counts:
            _put(state, "step", count)
        self._counts.clear()

    def remove(self) -> None:
        """Takes the hooks off the optimizer, and a factor that is still on."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
