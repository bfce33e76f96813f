"""Two ways to make a finished run longer without tuning its learning rate again, as schedules of the whole longer run.

``lr.two_stage`` and ``lr.longer_cooldown`` compute what to change. This module turns it into a shape that both a
resumed run and one from the start can use, with the point from which it differs from the schedule of the finished run.

Source: Schaipp et al. 2025, arXiv:2501.18965.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np

from adabatch.arguments import checked
from adabatch.batch.plan import Duration, Progress
from adabatch.lr.bound import longer_cooldown, two_stage, whole_units
from adabatch.lr.recorded import Recorded, RecordedUnit
from adabatch.lr.shapes import Decay, Shape, tabulated, wsd

RAMP_SHARE = 0.02
"""Length of the ramp to the second stage over that of the finished run: 1,000 of 50,000 steps in their logged runs."""

ENTRIES_PER_RUN = 200
"""Entries of the longer run's table per length of the finished run: the ramp has four of them."""

EXTENSIONS = ("two stages", "longer cooldown")


class SavedSchedule(NamedTuple):
    """The schedule of a run, from its checkpoint.

    Args:
        source: its name in errors, such as the path of the checkpoint.
        shape: of the learning rate after its warm-up.
        base_lrs: base learning rate of each parameter group.
        total: length of the run.
        warmup: progress at which the shape began, in the unit of the total; 0 without a warm-up, None while in it.
        changed: whether the total was changed during the run.
        clock: what the shape's progress counted.
        progress: what the applied updates had consumed.
        reference: the reference batch size.
    """

    source: str
    shape: Shape
    base_lrs: tuple[float, ...]
    total: Duration
    warmup: float | None
    changed: bool
    clock: RecordedUnit
    progress: Progress
    reference: int


class FinishedRun(NamedTuple):
    """A run to extend.

    Args:
        num_steps: its steps, warm-up included, as if all were equal parts of its total.
        warmup_steps: the number of such steps before its shape began.
        warmup: the same in the unit of the total.
        cooldown, decay: of its shape.
        total: length of the run.
    """

    num_steps: int
    warmup_steps: int
    warmup: float
    cooldown: float
    decay: Decay
    total: Duration

    def steps_of(self, total: Duration) -> int:
        """The number of steps of the same size in a run of another total."""
        # rounded, not cut: the same total must give the same number, whatever the quotient is rounded to
        return round(self.num_steps * total.count / self.total.count)

    def stable_until(self, total: float, cooldown: float) -> float:
        """The beginning of a cooldown in a run of that total, in its unit."""
        return total - cooldown * (total - self.warmup)


class ExtendedSchedule(NamedTuple):
    """An extension as a schedule of the whole longer run: up to ``resume`` it is that of the finished run.

    Args:
        shape: over the progress from the warm-up to the new total.
        lr_factor: factor on the learning rate at the end of the stable part.
        cooldown: share of that progress that cools down.
        resume: the point from which it differs from the schedule of the finished run, in the unit of the total.
    """

    shape: Shape
    lr_factor: float
    cooldown: float
    resume: float


@checked
def finished_run(saved: SavedSchedule) -> FinishedRun:
    """The run of a checkpoint.

    Raises:
        ValueError: if the shape cannot be extended, the future of its clock is unknown, or the run has not begun.
    """
    shape, total = saved.shape, saved.total
    settings = shape.settings
    if shape.name != "wsd" or not 0 < cast(float, settings["cooldown"]) < 1 or settings["floor"] != 0:
        raise ValueError(
            f"{saved.source}: only a wsd shape with a cooldown between 0 and 1 to zero can be extended, and the run "
            f"has {shape}. Start a longer run with the base learning rate that `adabatch schedule transfer` gives for "
            f"it"
        )
    if saved.clock == "gain_steps" and total.unit != "gain_steps":
        raise ValueError(f"{saved.source}: the run has the gain clock, whose rate over a longer run is not known yet")
    if saved.warmup is None:
        raise ValueError(f"{saved.source}: the run was still warming up, and its shape had not begun: train on first")
    if saved.changed:
        raise ValueError(
            f"{saved.source}: the total was changed during the run, so its shape is not the one that it was tuned for"
        )
    done = saved.progress.count(total.unit)
    if done == 0:
        raise ValueError(f"{saved.source}: the run has not begun")
    # A growing batch has unequal steps, and the bound counts equal ones: the run's mean pace stands for all of it.
    num_steps = total.count if total.unit == "steps" else max(1, round(saved.progress.steps * total.count / done))
    warmup_steps = round(num_steps * saved.warmup / total.count)
    cooldown, decay = cast(float, settings["cooldown"]), cast(Decay, settings["decay"])
    return FinishedRun(num_steps, warmup_steps, saved.warmup, cooldown, decay, total)


@checked
def extended_schedules(run: FinishedRun, total: Duration) -> dict[str, ExtendedSchedule]:
    """The run's own shape over a new total, and the two that keep its base learning rate the best one.

    Raises:
        ValueError: for the same reasons as ``lr.two_stage``.
    """
    new_steps = run.steps_of(total)
    given: dict[str, Any] = {"cooldown": run.cooldown, "decay": run.decay, "warmup_steps": run.warmup_steps}
    longer = longer_cooldown(run.num_steps, new_steps, **given)
    # first without a ramp, which only shows how many steps there are for one
    at_once = two_stage(run.num_steps, new_steps, **given)
    room = math.floor(at_once.num_steps - run.cooldown * (new_steps - run.warmup_steps))
    ramp = max(0, min(round(RAMP_SHARE * run.num_steps), room))
    stages = two_stage(run.num_steps, new_steps, ramp_steps=ramp, **given)

    # The second stage as a table over the whole run, so that a resumed run and one from the start read the same
    # schedule. It begins at an entry of the table, so that the factor is exactly 1 before it.
    until = run.stable_until(run.total.count, run.cooldown)
    # at most 20 times as many, which a config can still hold
    progress = np.linspace(0, 1, 1 + math.ceil(ENTRIES_PER_RUN * min(new_steps / run.num_steps, 20)))
    begin = (until - run.warmup) / (total.count - run.warmup)
    ramp_share = ramp / (new_steps - run.warmup_steps)
    after = progress - progress[np.searchsorted(progress, begin)]
    # max: without room for a ramp the factor applies from the next entry on
    falling = 1 + (stages.lr_factor - 1) * np.clip(after / max(ramp_share, 1e-9), 0, 1)
    rest = stages.shape((progress - begin - ramp_share) / (1 - begin - ramp_share))
    # six digits: the table is written into a config that people read
    table = [float(f"{value:.6g}") for value in (falling * rest).tolist()]

    # a longer cooldown may begin before that of the finished run did, and then departs from it there
    longer_until = run.stable_until(total.count, longer.cooldown)
    return {
        "unchanged": ExtendedSchedule(wsd(cooldown=run.cooldown, decay=run.decay), 1.0, run.cooldown, until),
        "two stages": ExtendedSchedule(tabulated(values=table), stages.lr_factor, run.cooldown, until),
        "longer cooldown": ExtendedSchedule(
            wsd(cooldown=longer.cooldown, decay=run.decay), 1.0, longer.cooldown, min(until, longer_until)
        ),
    }


def steps_done(saved: SavedSchedule, recorded: Recorded, count: float) -> int | None:
    """How many steps a run had done when it had consumed ``count`` of the unit of its total; None if it has not yet.

    Args:
        saved: its schedule.
        recorded: its journal, with the size of each step.
        count: in the unit of the total.
    """
    unit = saved.total.unit
    if unit == "steps":
        return whole_units(count)
    share = count / saved.progress.count(unit)
    if share > 1:
        return None
    edges = recorded.edges(saved.clock, saved.reference)
    # A share, because the total may be in tokens, which the edges do not count. The small addition keeps a step that
    # rounding moved just past it.
    return int(np.searchsorted(edges, (share + 1e-9) * edges[-1], side="right")) - 1
