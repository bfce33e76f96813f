"""The steps of a run from its journal: what was requested, decided and applied in each. Pure: numpy only.

``curves`` holds the data of pictures; this module holds the data that a report analyses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.lr.journal_lines import number_of, numbers_of, part_of
from adabatch.report.curves import JournalSource, records
from adabatch.report.evaluations import EvaluationMetric, Floats, read_metrics


class RunSteps(NamedTuple):
    """All steps of a run, including those whose update was left out. Missing numbers are NaN.

    All arrays have shape (num_steps,), except ``applied_lr`` and those of layers and metrics.

    Args:
        name: the name of the run in tables and legends.
        step: number of the step.
        examples: examples consumed before the step.
        batch: examples of the step.
        micro_batch: examples in one forward and backward on one rank.
        accumulation: micro-batches per rank.
        dp_size: ranks that saw different data.
        loss: mean loss of the step.
        wanted: batch size at which the criterion comes to rest; infinite if it was evaluated but no signal was seen.
        low: one-sided lower bound of ``wanted``.
        high: one-sided upper bound; infinite if there is none.
        freedom: degrees of freedom of the bounds.
        next_batch: batch size of the plan for the next step.
        reason: the reason for that plan, as in ``adabatch.batch.control.Reason``.
        noise: averaged noise, including this step.
        signal: averaged signal, including this step.
        measured: noise scale of this step's gradient alone, which may be negative by chance.
        measured_noise: noise of this step's gradient alone.
        measured_signal: signal of this step's gradient alone, which may be negative by chance.
        base_lr: base learning rate of the first parameter group.
        shape: warm-up times shape, of the first parameter group.
        factor: batch factor on the learning rate.
        applied_lr: learning rates of all parameter groups, shape (num_steps, num_groups).
        applied: whether the update was applied.
        seconds: time of a step of this plan, from the steps that this one ended; NaN if they were not timed.
        floors: "beta1" and "beta2" -> the floor that applied at the step; only the betas to which one ever applied.
        out_of_memory: steps at which a trial of a larger micro-batch ran out of memory -> the journal's entry.
        layers: names of the layers whose noise was measured separately.
        layer_noise: shape (num_steps, num_layers).
        layer_signal: shape (num_steps, num_layers).
        metrics: metrics of the evaluations; empty if there are none.
    """

    name: str
    step: Floats
    examples: Floats
    batch: Floats
    micro_batch: Floats
    accumulation: Floats
    dp_size: Floats
    loss: Floats
    wanted: Floats
    low: Floats
    high: Floats
    freedom: Floats
    next_batch: Floats
    reason: tuple[str, ...]
    noise: Floats
    signal: Floats
    measured: Floats
    measured_noise: Floats
    measured_signal: Floats
    base_lr: Floats
    shape: Floats
    factor: Floats
    applied_lr: Floats
    applied: NDArray[np.bool_]
    seconds: Floats
    floors: dict[str, Floats]
    out_of_memory: dict[int, Any]
    layers: tuple[str, ...]
    layer_noise: Floats
    layer_signal: Floats
    metrics: tuple[EvaluationMetric, ...]

    @property
    def num_steps(self) -> int:
        """Steps in the journal."""
        return len(self.batch)

    @property
    def num_examples(self) -> float:
        """Examples of all steps in the journal."""
        return float(self.batch.sum())

    @property
    def end(self) -> float:
        """Examples consumed after the last step."""
        return float(self.examples[-1] + self.batch[-1])

    @property
    def noise_scale(self) -> Floats:
        """Averaged noise over averaged signal, in examples, shape (num_steps,): infinite without signal, zero without
        noise, NaN while unknown."""
        known = np.isfinite(self.noise) & np.isfinite(self.signal)
        noise = np.where(known, np.maximum(self.noise, 0.0), math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(self.signal > 0, noise / self.signal, np.where(noise > 0, math.inf, 0.0))
        return np.where(known, scale, math.nan)

    @property
    def efficiency(self) -> Floats:
        """Worth of an example in each step relative to one in a small batch, ``1 / (1 + b / B)``, shape (num_steps,);
        NaN while the noise scale is unknown."""
        scale = self.noise_scale
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = 1 / (1 + self.batch / scale)
        return np.where(np.isnan(scale), math.nan, worth)


def read_steps(journal: JournalSource, name: str) -> RunSteps:
    """The steps of one run, which may still be running: an unfinished last line is ignored.

    Args:
        journal: a path to JSON lines, or the lines.
        name: the name of the run.

    Raises:
        ValueError: if a line before the last is damaged, or if the journal has a newer format, two runs, or no complete
            step.
    """
    lines = list(records(journal))
    rows = [row for row in lines if _is_step(row)]
    if not rows:
        raise ValueError(f"{name}: the journal has no complete step yet, so there is nothing to report")
    plans = [part_of(row, "plan") for row in rows]
    rates = [part_of(row, "lr") for row in rows]
    averages = [part_of(row, "averages") for row in rows]
    moments = [part_of(row, "moments") for row in rows]
    groups = max((len(numbers_of(each, "applied")) for each in rates), default=0)
    applied_lr = np.full((len(rows), groups), math.nan)
    for index, each in enumerate(rates):
        values = numbers_of(each, "applied")
        applied_lr[index, : len(values)] = values
    layers = tuple(dict.fromkeys(layer for row in rows for layer in part_of(row, "layers")))
    of_layers = [[part_of(part_of(row, "layers"), layer) for layer in layers] for row in rows]
    floors = tuple(dict.fromkeys(beta for row in rows for beta in part_of(row, "beta_floors")))

    def of(parts: list[Mapping[str, Any]], key: str) -> Floats:
        return np.array([number_of(part, key) for part in parts], dtype=np.float64)

    def by_layer(key: str) -> Floats:
        values = [[number_of(layer, key) for layer in row] for row in of_layers]
        return np.array(values, dtype=np.float64).reshape(len(rows), len(layers))

    wanted, low, high = of(rows, "wanted"), of(rows, "low"), of(rows, "high")
    # JSON has no infinity, so the journal writes null for it. If there is a lower bound, the estimate was made, and a
    # missing number means infinity.
    wanted = np.where(np.isnan(wanted) & np.isfinite(low), math.inf, wanted)
    high = np.where(np.isnan(high) & np.isfinite(low), math.inf, high)
    return RunSteps(
        name=name,
        step=of(rows, "step"),
        examples=of(rows, "examples"),
        batch=of(plans, "global_batch_size"),
        micro_batch=of(plans, "micro_batch_size"),
        accumulation=of(plans, "accumulation_steps"),
        dp_size=of(plans, "dp_size"),
        loss=of(rows, "loss"),
        wanted=wanted,
        low=low,
        high=high,
        freedom=of(rows, "freedom"),
        next_batch=of(rows, "next"),
        reason=tuple(str(row.get("reason") or "") for row in rows),
        noise=of(averages, "noise"),
        signal=of(averages, "signal"),
        measured=of(moments, "noise_scale"),
        measured_noise=of(moments, "noise"),
        measured_signal=of(moments, "signal"),
        base_lr=np.array([next(iter(numbers_of(each, "base")), math.nan) for each in rates]),
        shape=np.array([next(iter(numbers_of(each, "shape")), math.nan) for each in rates]),
        factor=of(rates, "factor"),
        applied_lr=applied_lr,
        applied=np.array([row.get("applied") is not False for row in rows]),
        seconds=_seconds(rows),
        floors={beta: of([part_of(row, "beta_floors") for row in rows], beta) for beta in floors},
        out_of_memory={int(row["step"]): row["out_of_memory"] for row in rows if row.get("out_of_memory")},
        layers=layers,
        layer_noise=by_layer("noise"),
        layer_signal=by_layer("signal"),
        metrics=read_metrics(lines),
    )


def filled(values: Floats) -> Floats:
    """Missing values replaced by the last known one; before the first known value, by that one."""
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return values
    # -1 before the first known one, which then stands for the beginning too
    before = np.searchsorted(known, np.arange(len(values)), side="right") - 1
    taken: Floats = values[known[np.maximum(before, 0)]]
    return taken


def _is_step(row: Mapping[str, Any]) -> bool:
    return number_of(part_of(row, "plan"), "global_batch_size") > 0 and math.isfinite(number_of(row, "examples"))


def _seconds(rows: Sequence[Mapping[str, Any]]) -> Floats:
    """The times at the steps that they belong to: a line has that of an earlier step.

    A line says whose time it has (``timed_plan``). In journals that were written before it did, the time is that of
    the last measured step before it.
    """
    found = np.full(len(rows), math.nan)
    last_of: dict[tuple[float, ...], int] = {}
    last_measured: int | None = None
    for at, row in enumerate(rows):
        seconds = number_of(row, "seconds")
        if math.isfinite(seconds):
            if timed := part_of(row, "timed_plan"):
                place = last_of.get(_plan_of(timed))  # None if the part of the journal with that step is lost
            else:
                place = at if last_measured is None else last_measured
            if place is not None:
                found[place] = seconds
        last_of[_plan_of(part_of(row, "plan"))] = at
        if part_of(row, "moments"):
            last_measured = at
    return found


def _plan_of(plan: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(number_of(plan, key) for key in ("micro_batch_size", "accumulation_steps", "dp_size"))
