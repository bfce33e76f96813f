"""``adabatch schedule compare`` and ``transfer``: shapes by their last-iterate bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adabatch.arguments import require
from adabatch.cli.display import Display
from adabatch.cli.picture import draw_picture
from adabatch.cli.schedule.recorded import read_run, read_saved, recorded_reference
from adabatch.cli.schedule.shape_text import parse_shape
from adabatch.lr.bound import linear_cooldown_ratio
from adabatch.lr.horizon import Horizon, ScheduleBound, schedule_bound
from adabatch.lr.recorded import RecordedUnit

STEPS = 1000
"""Default length of a schedule: the ratios between shapes hardly depend on it."""

BOUND_SOURCE = (
    "Defazio et al. 2023, arXiv:2310.07831, Theorem 10, as evaluated by Schaipp et al. 2025, arXiv:2501.18965"
)


def compare_shapes(
    *,
    shapes: list[str],
    steps: int | None,
    warmup_steps: int,
    norms: Path | None,
    clock: RecordedUnit | None,
    out: Path,
    display: Display,
) -> None:
    """A table and a picture of shapes by their bound.

    Args:
        shapes: as ``parse_shape`` takes them.
        steps: length of the schedules, warm-up included; by default that of the run, or 1,000.
        warmup_steps: length of the warm-up before each.
        norms: a run whose gradient norms, batch factors and progress the bound takes; without it they are constant.
        clock: what progress counts over that run; by default what the run itself counted.
        out: the PNG file.
        display: where the table goes.

    Raises:
        ValueError: if arguments and run do not match.
    """
    horizon = _horizons(norms, clock)(steps)
    bounded = {
        label: schedule_bound(shape, horizon, warmup_steps=warmup_steps) for label, shape in map(parse_shape, shapes)
    }
    first = next(iter(bounded.values())).terms
    least = min(one.terms.best for one in bounded.values())
    # a run's norms are numbers, so that only the distance stays unknown
    scale, rate = ("D G", "D/G") if norms is None else ("D", "D")
    header = (
        "shape",
        "mean factor",
        f"best base LR ({rate})",
        "x the first's",
        f"bound there ({scale})",
        "x the least",
    )
    rows = [
        (
            label,
            f"{one.factors.mean():.4f}",
            f"{one.terms.best_base_lr:.5g}",
            f"{one.terms.best_base_lr / first.best_base_lr:.3f}",
            f"{one.terms.best:.5g}",
            f"{one.terms.best / least:.4f}",
        )
        for label, one in bounded.items()
    ]
    display.table(f"{horizon.num_steps:,} steps, {_warmup(warmup_steps)}, {_gradients(norms)}", header, rows)
    display.say(f"best base LR = sqrt(T1/T2), bound there = 2 sqrt(T1 T2), of the last iterate: {BOUND_SOURCE}")
    display.say(
        "D, the distance from the start to a minimiser, is unknown and the same in every row: read the ratios. "
        "The bound ranks shapes; it is not a loss."
    )
    draw_picture(lambda draw: _compared(draw, bounded, constant=norms is None), out, display=display)


def transfer_lr(
    *,
    base_lr: float,
    source: str,
    target: str,
    steps: int | None,
    target_steps: int | None,
    warmup_steps: int,
    target_warmup_steps: int | None,
    norms: Path | None,
    clock: RecordedUnit | None,
    out: Path,
    display: Display,
) -> float:
    """The base learning rate for another shape or length, from one that was tuned.

    Args:
        base_lr: tuned for ``source`` over ``steps``.
        source, target: as ``parse_shape`` takes them.
        steps: length of the tuned run, warm-up included; by default that of ``norms``, or 1,000.
        target_steps: length of the new run; by default the same.
        warmup_steps: length of the tuned run's warm-up.
        target_warmup_steps: length of the new run's warm-up; by default the same.
        norms: a run whose gradient norms, batch factors and progress the bound takes for both, as functions of the
            share of the steps; without it they are constant.
        clock: what progress counts over that run; by default what the run itself counted.
        out: the PNG file.
        display: where the answer goes.

    Returns:
        The base learning rate.

    Raises:
        ValueError: if arguments and run do not match.
    """
    require(0 < base_lr < math.inf, "base_lr must be positive and finite", base_lr)
    (old_label, old), (new_label, new) = parse_shape(source), parse_shape(target)
    horizon = _horizons(norms, clock)
    before = horizon(steps)
    # the norms as a function of the share of the steps, as the new run is assumed to have them
    after = before if target_steps is None else horizon(target_steps)
    warmup_after = warmup_steps if target_warmup_steps is None else target_warmup_steps
    tuned, wanted = (
        schedule_bound(old, before, warmup_steps=warmup_steps),
        schedule_bound(new, after, warmup_steps=warmup_after),
    )
    factor = wanted.terms.best_base_lr / tuned.terms.best_base_lr
    answers = (base_lr, base_lr * factor)
    rows = [
        (
            f"{name}: {label}",
            f"{one.horizon.num_steps:,}",
            f"{warmup:,}",
            f"{one.factors.mean():.4f}",
            f"{one.terms.best_base_lr / tuned.terms.best_base_lr:.4f}",
            f"{answer:.4g}",
        )
        for name, label, one, warmup, answer in (
            ("tuned", old_label, tuned, warmup_steps, answers[0]),
            ("new", new_label, wanted, warmup_after, answers[1]),
        )
    ]
    header = ("shape", "steps", "warm-up", "mean factor", "factor on the base LR", "base LR")
    display.table(f"Base learning rate, {_gradients(norms)}", header, rows)
    display.say(f"factor = ratio of sqrt(T1/T2), the best base LR of the last-iterate bound: {BOUND_SOURCE}")
    closed = linear_cooldown_ratio(old, new, before.num_steps, after.num_steps)
    if closed is not None:
        display.say(
            f"closed form for linear cooldowns c, long runs, no warm-up, constant norms: factor {closed:.4f}, "
            f"base LR {base_lr * closed:.4g}; it is the ratio of sqrt(2 / ((2 - c)(2 + ln((2 - c)/c)) steps)), "
            f"the limit of the same bound (adabatch.lr.linear_cooldown_limits)"
        )
    named = {f"tuned: {old_label}": (tuned, answers[0]), f"new: {new_label}": (wanted, answers[1])}
    draw_picture(lambda draw: _transferred(draw, named), out, display=display)
    return answers[1]


def _horizons(norms: Path | None, clock: RecordedUnit | None) -> Callable[[int | None], Horizon]:
    """Equal steps, or those of a run, for each of the lengths."""
    if norms is None:
        if clock is not None:
            raise ValueError(f"clock={clock} says what the progress of a run counts: give the run, with --norms RUN")
        return lambda steps: Horizon.of_equal_steps(STEPS if steps is None else steps)
    recorded, saved = read_run(norms), read_saved(norms)
    counted = clock or (saved.clock if saved else "examples")
    horizon = Horizon.of_run(recorded, counted, recorded_reference(recorded, saved))
    return lambda steps: horizon if steps is None else horizon.resampled(steps)


def _compared(draw: Any, bounded: dict[str, ScheduleBound], *, constant: bool) -> list[Any]:
    """Learning rates at their best base LR, the bound over time, and the norms if they are not constant."""
    rates = [
        draw.Line(label, np.arange(one.horizon.num_steps), one.terms.best_base_lr * one.factors)
        for label, one in bounded.items()
    ]
    bounds = [draw.Line(label, *one.over_time(one.terms.best_base_lr)) for label, one in bounded.items()]
    least = min(one.terms.best for one in bounded.values())
    unit = ("D / G", "D G") if constant else ("D", "D")
    panels = [
        draw.Panel(
            f"learning rate{'' if constant else ', batch factor included'} ({unit[0]})",
            rates,
            note="each at its best base LR",
        ),
        draw.Panel(
            # top, because the bound after few steps is many times as large, and would flatten the rest
            f"bound of the last iterate ({unit[1]})",
            bounds,
            note="if the run ended here",
            log="y",
            top=6 * least,
        ),
    ]
    if not constant:
        horizon = next(iter(bounded.values())).horizon
        line = draw.Line("norms of the run", np.arange(horizon.num_steps), horizon.norms, "reference")
        panels.append(draw.Panel("gradient norm", [line], log="y"))
    panels[-1] = panels[-1]._replace(x_title="step")
    return panels


def _transferred(draw: Any, named: dict[str, tuple[ScheduleBound, float]]) -> list[Any]:
    """Both schedules, and their bounds against the base learning rate."""
    best = [base_lr for _, base_lr in named.values()]
    grid = np.geomspace(min(best) / 4, max(best) * 4, 400)
    (tuned, tuned_lr), _ = named.values()
    # the tuned base learning rate says how far the minimiser is
    distance = tuned_lr / tuned.terms.best_base_lr
    rates, bounds, marks = [], [], []
    for label, (one, base_lr) in named.items():
        rates.append(draw.Line(label, np.arange(one.horizon.num_steps), base_lr * one.factors))
        relative = [one.terms.at(lr / distance) / tuned.terms.best for lr in grid]
        bounds.append(draw.Line(label, grid, relative))
        marks.append(draw.Mark(label, base_lr, one.terms.best / tuned.terms.best, f"{base_lr:.3g}"))
    return [
        draw.Panel("learning rate", rates, x_title="step"),
        draw.Panel(
            "bound of the last iterate (1: tuned run)", bounds, marks, x_title="base learning rate", log="x", own_x=True
        ),
    ]


def _warmup(steps: int) -> str:
    return f"warm-up of {steps:,} steps" if steps else "no warm-up"


def _gradients(norms: Path | None) -> str:
    return "constant gradient norm G" if norms is None else f"gradient norms of {norms}"
