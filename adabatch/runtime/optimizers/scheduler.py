"""The learning rate of a run: a torch ``LRScheduler`` driven by progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from adabatch.arguments import checked, checked_but, require, require_format, require_one_of, require_state, shown
from adabatch.batch.plan import Duration, Progress, Unit
from adabatch.lr.clock import Anchor, Clock, share_of
from adabatch.lr.function_shape import AnyShape, check_same_shape, shape_from
from adabatch.lr.shapes import warmup_factor
from adabatch.runtime.optimizers.joined import each_of, joined, kind_of, without_rate
from adabatch.runtime.optimizers.ownership import remove_all, take_over
from adabatch.runtime.optimizers.step_hooks import hook_step, host_value, put_setting
from adabatch.runtime.wrappers.backward import left_out

STATE_FORMAT = 1

_ENTRIES = ("format", "base_lrs", "shape", "total", "warmup", "warmup_start", "clock", "anchor", "passed", "last_epoch")
"""What a saved schedule holds at least."""

ClockKind = Literal["total", "gain"]


@runtime_checkable
class ProgressSource(Protocol):
    """The source of a schedule's progress; ``AdaptiveBatch`` is one."""

    @property
    def progress(self) -> Progress:
        """What the applied updates consumed so far."""
        ...

    @property
    def progress_after_next(self) -> Progress:
        """The progress after the next step."""
        ...

    @property
    def lr_factor(self) -> float:
        """The batch factor of the next update."""
        ...


@runtime_checkable
class GrowthHold(ProgressSource, Protocol):
    """A source whose batch can wait for the end of the warm-up; ``AdaptiveBatch`` is one."""

    def hold_growth_until(self, duration: Duration | None) -> None:
        """Keeps the batch from growing before this much of the run is over."""
        ...


class WritesRates(Protocol):
    """A schedule that a source tells of its updates; ``ProgressLR`` is one."""

    @property
    def optimizer(self) -> Optimizer:
        """Whose rates it writes."""
        ...

    def check_rates(self) -> None:
        """Called before each update."""
        ...

    def write_rates(self) -> None:
        """Called when another progress was loaded."""
        ...

    def lose_source(self, reason: str) -> None:
        """Called when the source counts no more updates; ``reason`` says what became of it."""
        ...


@runtime_checkable
class TellsSchedules(ProgressSource, Protocol):
    """A source that tells its schedules of updates; ``AdaptiveBatch`` is one."""

    def add_schedule(self, schedule: WritesRates) -> None:
        """Tells a schedule from now on, until it is dropped."""
        ...


class CountedSteps:
    """A progress source for runs without ``AdaptiveBatch``: it only counts the optimizer's steps."""

    lr_factor = 1.0

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = Progress() if progress is None else progress
        self._handles: list[RemovableHandle] = []
        self._num_optimizers = 1
        self._schedule: Callable[[], WritesRates | None] = lambda: None
        self._applied: dict[int, bool] = {}  # those of several optimizers that have made their part of the update

    def __getstate__(self) -> Progress:
        return self.progress

    def __setstate__(self, progress: Progress) -> None:
        CountedSteps.__init__(self, progress)

    def listen(self, optimizer: Optimizer) -> None:
        """Counts the steps of ``optimizer`` from now on. A copy of the optimizer has no hooks: call this again for
        it."""
        self._num_optimizers = len(each_of(optimizer))
        self._handles = hook_step(optimizer, self._begin, self._count)

    def add_schedule(self, schedule: WritesRates) -> None:
        """Tells the schedule of each step from now on, until it is dropped."""
        self._schedule = ref(schedule)

    def _begin(self, optimizer: Optimizer, _: object) -> None:
        schedule = self._schedule()
        if schedule is not None:
            schedule.check_rates()

    def _count(self, optimizer: Optimizer) -> None:
        self._applied[id(optimizer)] = not left_out(optimizer)
        if len(self._applied) == self._num_optimizers:
            if all(self._applied.values()):
                self.progress = self.progress.after(0)
            self._applied.clear()

    def stop(self) -> None:
        """Removes the hooks from the optimizer."""
        remove_all(self._handles)

    @property
    def progress_after_next(self) -> Progress:
        """One step later."""
        return self.progress.after(0)


class ProgressLR(LRScheduler):
    """``base LR x shape(progress)``, with progress in examples, tokens or steps: a torch ``LRScheduler``.

    Call ``step()`` after ``optimizer.step()``, as with any scheduler. It reads progress instead of counting calls, so
    a second call, or one after an update that was skipped, changes nothing. The batch factor is not in
    ``group["lr"]``; ``get_last_lr`` includes it.

    A group that is added to the optimizer during the run follows the shape from the next ``step()`` on, with its
    initial LR as its base LR. Call ``step()`` right after ``add_param_group``, so that its first update follows the
    shape too.

    A second schedule on the same optimizer replaces the first, whose ``step()`` raises an error from then on.

    Args:
        optimizer: its groups keep their own base LRs. Several optimizers need a list, or one schedule each.
        shape: progress in [0, 1] -> factor, from ``adabatch.lr`` or your own function, finite and not negative. For a
            function, its name and some of its values are saved, and compared on resume (``lr.FunctionShape``).
        source: of progress, an ``AdaptiveBatch``; None counts optimizer steps.
        total: length of the run.
        warmup: length of a linear warm-up before the shape, in any unit, or as a share of the total, such as 0.1; the
            shape runs over the rest. If the batch grows, a number of steps is a smaller share of the examples.
        warmup_start: first factor of the warm-up, in [0, 1]. The first update is already one step past it.
        clock: "total" counts progress in the unit of the total. "gain" counts gain-steps towards a total in any unit:
            each step advances the shape by its gain, and the number of steps need not be known.

    Attributes:
        built_lrs: the base LRs with which the optimizer was built, one per group; a resumed run compares them to find
            out whether the user has changed them.

    Raises:
        ValueError: if the total has no length, the warm-up is not shorter than the total, a total is in examples or
            tokens without a source that counts them, a learning rate is not finite or set by the optimizer itself
            (``lr=None``), or a value of the function is not a factor.
        TypeError: if the shape is neither a ``Shape`` nor a function, or a length has no unit.
    """

    @checked_but("optimizer", "shape", "total", "warmup")
    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        shape: AnyShape | Callable[[float], float],
        source: ProgressSource | None = None,
        *,
        total: Duration,
        warmup: Duration | float | None = None,
        warmup_start: float = 0.0,
        clock: ClockKind = "total",
    ) -> None:
        for name, length in (("total", total), ("warmup", warmup)):
            # Only a float is a share: a whole number such as 1 could be meant as one step.
            share = isinstance(length, float) and name == "warmup"
            if not isinstance(length, Duration) and not share and (length is not None or name == "total"):
                way_out = " (a share of the total is a float, such as 0.1)" if name == "warmup" else ""
                raise TypeError(
                    f"{name} must be a duration, such as adabatch.steps({shown(length)}), got {shown(length)}{way_out}"
                )
        require(0 <= warmup_start <= 1, "warmup_start must be in [0, 1]", warmup_start)
        require_one_of("clock", clock, ClockKind)
        optimizer = joined(optimizer)
        if isinstance(optimizer, Optimizer) and (kind := without_rate(optimizer)) is not None:
            raise ValueError(
                f"{kind} sets its learning rate itself (lr=None), so no schedule can: leave ProgressLR out, or give "
                f"the optimizer a learning rate (Adafactor: relative_step=False)"
            )
        # what is not an optimizer is named by torch's own error, below
        for group in optimizer.param_groups if isinstance(optimizer, Optimizer) else ():
            if not math.isfinite(group["lr"]):  # torch's optimizers accept NaN
                raise ValueError(f"the learning rate of {type(optimizer).__name__} must be finite, got {group['lr']}")
        self.shape = shape_from(shape)
        self._warmup_share = warmup if isinstance(warmup, float) else None
        if isinstance(warmup, float):
            warmup = share_of(total, warmup)
        self._clock = Clock(total, warmup)
        self._warmup_start = warmup_start
        self._kind: ClockKind = clock
        self._anchor: Anchor | None = None
        self._passed = 0.0
        counted = CountedSteps()
        self._source: ProgressSource = counted if source is None else source
        for name, length in (("total", total), ("warmup", warmup)):
            if length is not None:
                self._check_unit(length.unit, f"{name}: {length} cannot be counted")
        if clock == "gain":
            self._check_unit("gain_steps", "clock='gain' cannot be read")
        self._replaced = False
        self._loaded_at = 0  # number of updates before the state that was loaded, until the next update
        self._lost: str | None = None  # what became of the source, if it counts no more
        self._written: list[float] = []  # the rates in the groups after the last step(); NaN where unknown
        self._written_at = 0  # number of updates before it
        if source is None:
            counted.listen(optimizer)
        if isinstance(optimizer, Optimizer):
            self._num_groups = [len(one.param_groups) for one in each_of(optimizer)]
            take_over(self, each_of(optimizer), kind="ProgressLR")
        if self._clock.warmup is not None and isinstance(source, GrowthHold):
            source.hold_growth_until(self._clock.warmup)
        # torch's constructor calls step(), so everything that it reads must exist by now.
        super().__init__(optimizer)
        self._listen()
        # A copy, since groups that are added later are inserted into base_lrs.
        self.built_lrs = [float(base) for base in self.base_lrs]

    @property
    def warmup(self) -> Duration | None:
        """Length of the warm-up, even if it was given as a share; None for none."""
        return self._clock.warmup

    def give_way(self) -> None:
        """A newer schedule sets the rates of this optimizer."""
        self._replaced = True
        if isinstance(self._source, CountedSteps):
            self._source.stop()

    def _listen(self) -> None:
        if isinstance(self._source, TellsSchedules):
            self._source.add_schedule(self)

    def _note_written(self) -> None:
        self._written = [host_value(group["lr"]) for group in self.optimizer.param_groups]
        self._written_at = self._source.progress.steps

    def write_rates(self) -> None:
        """Writes the rates of the next update again, if this schedule was not replaced."""
        if not self._replaced:
            self._write()

    def lose_source(self, reason: str) -> None:
        """``step()`` raises from now on: the progress that it reads stands still, and so would the rate."""
        self._lost = self._lost or reason

    def check_rates(self) -> None:
        """Checks, before an update, that its rates are those of this schedule.

        Raises:
            RuntimeError: if ``step()`` was not called since the last update, or something else has changed the rates.
        """
        if self._source.progress.steps < self._loaded_at and not self._replaced:
            raise RuntimeError(
                f"the ProgressLR was loaded from a run of {self._loaded_at} updates, and its AdaptiveBatch has made "
                f"{self._source.progress.steps}, so that the schedule would begin again: load the state_dict() of the "
                f"AdaptiveBatch too, or, for a new run, do not load the schedule"
            )
        self._loaded_at = 0
        rates = self._check_unchanged()
        behind = self._source.progress.steps - self._written_at
        if not rates or behind <= 0:
            return
        # Calling step() seldom does no harm as long as the rate is constant.
        due = [host_value(lr) for lr in self.get_lr()]
        # With a tolerance: what is due is computed here, and the rate in the group may have been rounded to float32.
        if any(abs(rate - now) > 1e-6 * abs(now) for rate, now in zip(rates, due, strict=True)):
            raise RuntimeError(
                f"the learning rate is still {rates[0]:g}, which ProgressLR set {behind} update(s) ago, and should be "
                f"{due[0]:g} by now: call step() of the ProgressLR after each optimizer.step(), not once per epoch"
            )

    def _check_unchanged(self) -> list[float]:
        """The rates, if they are those that this schedule wrote last; none if that cannot be known."""
        rates = [host_value(group["lr"]) for group in self.optimizer.param_groups]
        if self._replaced or len(rates) != len(self._written):  # an engine may show only some of the groups
            return []
        for number, (rate, written) in enumerate(zip(rates, self._written, strict=True)):
            # Without a tolerance: nobody computes with the rate between the two. NaN is a rate on an accelerator, not
            # read.
            if rate != written and not math.isnan(rate) and not math.isnan(written):
                raise RuntimeError(
                    f"the learning rate of parameter group {number} is {rate:g}, but ProgressLR has set it to "
                    f"{written:g}: something else changes it too, such as a torch scheduler on the same optimizer, a "
                    f"framework, a line of the loop, or load_state_dict() of the optimizer after that of the schedule. "
                    f"Leave that out, or ProgressLR; set_base_lrs() of ProgressLR changes the rate during a run"
                )
        return rates

    def _check_in_place(self) -> None:
        if self._replaced:
            raise RuntimeError(
                f"this ProgressLR was replaced by a newer one on the same {kind_of(self.optimizer)}: step that one"
            )
        if self._lost is not None:
            raise RuntimeError(
                f"the AdaptiveBatch whose progress this ProgressLR reads was {self._lost}, so that the learning rate "
                f"would stand still: make a new ProgressLR with the AdaptiveBatch that runs now, and load the "
                f"state_dict() of this one into it"
            )

    def _take_in_groups(self) -> None:
        """Groups that were added to an optimizer get their initial rate as their base rate."""
        start = 0
        for number, one in enumerate(each_of(self.optimizer)):
            known = self._num_groups[number]
            if len(one.param_groups) < known:
                raise RuntimeError(
                    f"{type(one).__name__} had {known} parameter groups and has {len(one.param_groups)} now, and it is "
                    f"not known which one was removed: make a new ProgressLR after a group is removed"
                )
            for place, group in enumerate(one.param_groups[known:], start + known):
                rate = group["lr"]
                group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)
                # Not appended: if there are several optimizers, the groups of the next one follow.
                self.base_lrs.insert(place, group["initial_lr"])
            self._num_groups[number] = len(one.param_groups)
            start += len(one.param_groups)

    def _check_unit(self, unit: Unit, refused: str) -> None:
        if unit != "steps" and isinstance(self._source, CountedSteps):
            raise ValueError(f"{refused} without an AdaptiveBatch: pass it as the third argument")
        self._source.progress_after_next.count(unit)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After unpickling or copying: the copied optimizer has no hooks yet."""
        self.__dict__.update(state)
        if isinstance(self._source, CountedSteps):
            self._source.listen(self.optimizer)
            self._listen()

    def factor(self) -> float:
        """``warm-up x shape`` for the next update."""
        clock, progress = self._clock, self._source.progress
        if clock.warming_up(progress):
            ramp = warmup_factor(clock.warmup_fraction(self._source.progress_after_next), start=self._warmup_start)
            return ramp * float(self.shape(0.0))
        return float(self.shape(self._fraction()))

    def _fraction(self) -> float:
        """Progress of the shape, after the warm-up; it never decreases."""
        clock, progress = self._clock, self._source.progress
        if self._kind == "total":
            if self._anchor is None:
                self._anchor = clock.anchor(progress)
            return clock.fraction(progress, self._anchor)
        after, unit = self._source.progress_after_next, clock.total.unit
        gain = after.count("gain_steps") - progress.count("gain_steps")
        # The rate of the next step stands for the rest of the run: how many steps are left is not known.
        gain_per_unit = gain / (after.count(unit) - progress.count(unit))
        if self._anchor is None:
            self._anchor = clock.anchor(progress, gain_per_unit)
        self._passed = clock.gain_fraction(progress, gain_per_unit, self._anchor, self._passed)
        return self._passed

    @checked_but("total")
    def set_total(self, total: Duration) -> None:
        """Changes the total during a run. The rate does not jump: the rest of the shape is stretched over the rest of
        the run.

        If the shape is over, the rate stays at its end; to extend such a run, see ``lr.two_stage`` and
        ``lr.longer_cooldown``. To resume the run after this, build it with the new total.

        Raises:
            TypeError: if the total has no unit.
            ValueError: if the total is already over, not longer than the present warm-up, or in a unit that is not
                counted.
        """
        if not isinstance(total, Duration):
            raise TypeError(f"total must be a duration, such as adabatch.steps({shown(total)}), got {shown(total)}")
        self._check_unit(total.unit, f"total: {total} cannot be counted")
        if self._source.progress.reached(total):
            raise ValueError(f"the run is already past {total}: give a total that lies ahead")
        self._check_in_place()
        clock = Clock(total, self._clock.warmup)
        progress = self._source.progress
        if not self._clock.warming_up(progress):
            # By the old clock, which is replaced below: the rest of the shape begins here.
            fraction = self._fraction()
            self._anchor = Anchor(progress.count(total.unit), fraction, progress.gain_steps or 0.0)
            self._passed = fraction
        self._clock = clock
        self._write()

    @checked
    def set_base_lrs(self, base_lrs: Sequence[float]) -> None:
        """Changes the base LRs during a run, and writes the rates of the next update.

        Args:
            base_lrs: one per parameter group.

        Raises:
            ValueError: if their number is not that of the groups, or one is not finite.
        """
        rates = [float(rate) for rate in base_lrs]
        require(all(rate >= 0 for rate in rates if math.isfinite(rate)), "base_lrs must not be negative", rates)
        if len(rates) != len(self.optimizer.param_groups) or not all(map(math.isfinite, rates)):
            raise ValueError(
                f"base_lrs must be {len(self.optimizer.param_groups)} finite rate(s), one for each group, got {rates}"
            )
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            # torch keeps the base rate of a group under this name.
            group["initial_lr"] = rate
        self.base_lrs = [*rates]
        self._write()

    def step(self, epoch: int | None = None) -> None:
        """Writes the rates of the next update; call it after ``optimizer.step()``, also if the update was skipped."""
        self._check_in_place()
        self._check_unchanged()  # also before an update: what another scheduler wrote would be written over unseen
        self._take_in_groups()
        # torch's step() counts calls, so that it would lose a rate for an update that a gradient scaler skips, and
        # warns about a first call without an update. Progress is read here, not counted.
        self._step_count += self._step_count == 1
        super().step(epoch)
        self._note_written()

    def get_lr(self) -> list[float | Tensor]:
        """``base LR x warm-up x shape`` of each group."""
        factor = self.factor()
        return [base * factor for base in self.base_lrs]

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates that ``optimizer.step()`` applies next: those of the groups, times the batch factor."""
        factor = self._source.lr_factor
        return [lr * factor for lr in super().get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Base LRs, shape and lengths as plain data, and where the shape started."""
        warmup = self._clock.warmup
        total = self._clock.total
        return {
            "format": STATE_FORMAT,
            "base_lrs": [float(base) for base in self.base_lrs],
            "built_lrs": self.built_lrs,
            "shape": self.shape.to_dict(),
            "total": [total.count, str(total.unit)],
            "warmup": None if warmup is None else [warmup.count, warmup.unit],
            "warmup_share": self._warmup_share,
            "warmup_start": self._warmup_start,
            "clock": self._kind,
            "anchor": None if self._anchor is None else [*astuple(self._anchor)],
            "passed": self._passed,
            "last_epoch": self.last_epoch,
            "steps": self._source.progress.steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the schedule and writes the right rates into the groups.

        Load the ``AdaptiveBatch`` first: the rates depend on its progress.

        Raises:
            ValueError: if the format is newer, or the number of groups, the shape, the total, the warm-up or the clock
                differs from the saved one.
        """
        require_state(state_dict, *_ENTRIES, of="a ProgressLR", argument="state_dict")
        require_format("the schedule", state_dict["format"], STATE_FORMAT)
        self._take_in_groups()
        if len(state_dict["base_lrs"]) != len(self.base_lrs):
            raise ValueError(
                f"the schedule was saved with {len(state_dict['base_lrs'])} parameter groups, "
                f"the optimizer has {len(self.base_lrs)}: build it as the saved run did"
            )
        self._check_in_place()
        mine = self.state_dict()
        check_same_shape(self.shape, state_dict["shape"])
        if self._warmup_share is not None and state_dict.get("warmup_share") == self._warmup_share:
            mine["warmup"] = state_dict["warmup"]  # a share of the original total, before set_total
        for name in ("total", "warmup", "warmup_start", "clock"):
            if state_dict[name] != mine[name]:
                raise ValueError(
                    f"the schedule was saved with {name}={state_dict[name]}, this run has {mine[name]}: its learning "
                    f"rate would jump; resume with the saved value (and change the total afterwards with set_total)"
                )
        if mine["warmup"] is not None:
            self._clock = Clock(self._clock.total, Duration(*mine["warmup"]))
        for group, base in zip(self.optimizer.param_groups, state_dict["base_lrs"], strict=True):
            group["initial_lr"] = base
        self.base_lrs = list(state_dict["base_lrs"])
        self._anchor = None if state_dict["anchor"] is None else Anchor(*state_dict["anchor"])
        self._passed = state_dict["passed"]
        self.last_epoch = state_dict["last_epoch"]
        if isinstance(self._source, CountedSteps):
            self._source.progress = Progress(steps=state_dict["steps"] or 0)
        self._loaded_at = state_dict["steps"] or 0
        self._write()

    def _write(self) -> None:
        self._take_in_groups()
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            put_setting(group, "lr", lr)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self._note_written()
