"""The steps of a run as its journal tells them, with what was asked for, decided and applied. Pure: numpy only.

``curves`` holds what pictures show; this holds what a report reasons about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.report.curves import Journal, records

Floats = NDArray[np.float64]


class RunSteps(NamedTuple):
    """All steps of a run, those whose update was left out among them; missing numbers are NaN.

    Args:
        name: what the run is called in tables and legends.
        step: number of the step, shape (num_steps,); so are all others, but for ``applied_lr`` and the layers.
        examples: consumed before it.
        batch: examples that it took.
        micro_batch: examples in one forward and backward on one rank.
        accumulation: micro-batches that a rank ran for it.
        dp_size: ranks that saw different data.
        loss: its mean loss.
        wanted: batch size at which the criterion comes to rest; infinite where it was asked, and no signal was seen.
        low: one-sided bound of that from below.
        high: from above; infinite where it has no end.
        freedom: degrees of freedom behind the bounds.
        next_batch: batch size of the plan for the next step.
        reason: why that, in the words of ``adabatch.batch.control.Reason``.
        noise: average with this step in it.
        signal: average with this step in it.
        measured: noise scale of this step's gradient alone; not positive where chance has it so.
        measured_noise: noise of this step's gradient alone.
        measured_signal: signal of this step's gradient alone; not positive where chance has it so.
        base_lr: of the first parameter group.
        shape: warm-up times shape, of the first parameter group.
        factor: batch factor on the learning rate.
        applied_lr: of all parameter groups, shape (num_steps, num_groups).
        applied: whether the update was applied.
        seconds: how long a step lately took, where that was timed.
        floors: for "beta1" and "beta2", the floor that held it back at the step; only those that ever did.
        out_of_memory: steps at which a trial of a larger micro-batch ran out of memory, with what the journal says.
        layers: names of the layers whose noise was measured apart.
        layer_noise: shape (num_steps, num_layers).
        layer_signal: shape (num_steps, num_layers).
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

    @property
    def num_steps(self) -> int:
        """Steps in the journal."""
        return len(self.batch)

    @property
    def num_examples(self) -> float:
        """Examples that the steps in the journal took."""
        return float(self.batch.sum())

    @property
    def noise_scale(self) -> Floats:
        """Averaged noise over averaged signal, in examples: infinite without signal, zero without noise, NaN while
        unknown; shape (num_steps,)."""
        known = np.isfinite(self.noise) & np.isfinite(self.signal)
        noise = np.where(known, np.maximum(self.noise, 0.0), math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(self.signal > 0, noise / self.signal, np.where(noise > 0, math.inf, 0.0))
        return np.where(known, scale, math.nan)

    @property
    def efficiency(self) -> Floats:
        """Worth of an example in each step over that of one in a small batch, ``1 / (1 + b / B)``, shape (num_steps,);
        NaN while the noise scale is unknown."""
        scale = self.noise_scale
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = 1 / (1 + self.batch / scale)
        return np.where(np.isnan(scale), math.nan, worth)


def read_steps(journal: Journal, name: str) -> RunSteps:
    """The steps of one run, also of one that still runs: an unfinished last line is left out.

    Args:
        journal: a path to JSON lines, or the lines.
        name: what to call the run.

    Raises:
        ValueError: if a line before the last is damaged, or the journal has a newer format, two runs or no complete step.
    """
    rows = [row for row in records(journal) if _is_step(row)]
    if not rows:
        raise ValueError(f"{name}: the journal holds no complete step yet, so there is nothing to report")
    plans = [_part(row, "plan") for row in rows]
    rates = [_part(row, "lr") for row in rows]
    averages = [_part(row, "averages") for row in rows]
    moments = [_part(row, "moments") for row in rows]
    groups = max((len(_list(each, "applied")) for each in rates), default=0)
    applied_lr = np.full((len(rows), groups), math.nan)
    for index, each in enumerate(rates):
        values = _list(each, "applied")
        applied_lr[index, : len(values)] = values
    layers = tuple(dict.fromkeys(layer for row in rows for layer in _part(row, "layers")))
    of_layers = [[_part(_part(row, "layers"), layer) for layer in layers] for row in rows]
    floors = tuple(dict.fromkeys(beta for row in rows for beta in _part(row, "beta_floors")))

    def of(parts: list[Mapping[str, Any]], key: str) -> Floats:
        return np.array([_number(part.get(key)) for part in parts], dtype=np.float64)

    def by_layer(key: str) -> Floats:
        values = [[_number(layer.get(key)) for layer in row] for row in of_layers]
        return np.array(values, dtype=np.float64).reshape(len(rows), len(layers))

    wanted, low, high = of(rows, "wanted"), of(rows, "low"), of(rows, "high")
    # The journal has null for what is not finite: of the bounds of an estimate that is an end that is not there.
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
        base_lr=np.array([next(iter(_list(each, "base")), math.nan) for each in rates]),
        shape=np.array([next(iter(_list(each, "shape")), math.nan) for each in rates]),
        factor=of(rates, "factor"),
        applied_lr=applied_lr,
        applied=np.array([row.get("applied") is not False for row in rows]),
        seconds=of(rows, "seconds"),
        floors={beta: of([_part(row, "beta_floors") for row in rows], beta) for beta in floors},
        out_of_memory={int(row["step"]): row["out_of_memory"] for row in rows if row.get("out_of_memory")},
        layers=layers,
        layer_noise=by_layer("noise"),
        layer_signal=by_layer("signal"),
    )


def _is_step(row: Mapping[str, Any]) -> bool:
    return _number(_part(row, "plan").get("global_batch_size")) > 0 and math.isfinite(_number(row.get("examples")))


def _part(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    return value if isinstance(value, Mapping) else {}


def _list(row: Mapping[str, Any], key: str) -> list[float]:
    value = row.get(key)
    return [_number(item) for item in value] if isinstance(value, list) else []


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
