"""The evaluations of a run: the values of each metric in its journal, and which was the best. Pure: numpy only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.lr.journal_lines import finite_number, number_of, part_of

Floats = NDArray[np.float64]

LOWER_IS_BETTER = frozenset(
    {"loss", "error", "err", "perplexity", "ppl", "nll", "bpb", "bpc", "mse", "rmse", "mae", "wer", "cer", "fid"}
)
"""Words in the name of a metric by which a lower value is the better one; of all other metrics a higher one is."""


class EvaluationMetric(NamedTuple):
    """One metric over the run, in the order of the evaluations.

    Args:
        name: as it was recorded.
        step: steps before each evaluation, shape (num_evaluations,).
        examples: consumed before it, of the same shape.
        values: NaN if not finite, of the same shape.
    """

    name: str
    step: Floats
    examples: Floats
    values: Floats

    @property
    def lower_is_better(self) -> bool:
        """Whether its name says so: one of its words is in ``LOWER_IS_BETTER``."""
        # whole words: "error" is in "terror", and "loss" in "glossary"
        return not LOWER_IS_BETTER.isdisjoint(re.split(r"[^a-z]+", self.name.lower()))

    @property
    def best(self) -> int | None:
        """Which evaluation had the best value, the first of equal ones; None without a finite value."""
        # nanargmin raises an error then
        if not np.isfinite(self.values).any():
            return None
        return int(np.nanargmin(self.values) if self.lower_is_better else np.nanargmax(self.values))


class Extremes(NamedTuple):
    """The best and the last value of a metric; NaN without a finite value.

    Args:
        best: the lowest value if that is the better one, else the highest.
        best_at: examples before it.
        last: the value of the last evaluation.
        last_at: examples before it.
        num_evaluations: in which it was recorded.
        lower_is_better: which of two values is the better one.
    """

    best: float
    best_at: float
    last: float
    last_at: float
    num_evaluations: int
    lower_is_better: bool


def extremes(metric: EvaluationMetric) -> Extremes:
    """The best and the last value of a metric."""
    at = metric.best
    return Extremes(
        math.nan if at is None else float(metric.values[at]),
        math.nan if at is None else float(metric.examples[at]),
        float(metric.values[-1]),
        float(metric.examples[-1]),
        len(metric.values),
        metric.lower_is_better,
    )


def read_metrics(lines: Iterable[Mapping[str, Any]]) -> tuple[EvaluationMetric, ...]:
    """The metrics of a journal, in the order in which they appear; "loss" first.

    If a step was evaluated twice, as by a run that was started again at its end, the later evaluation counts.

    Args:
        lines: of a journal; those without an evaluation are skipped.
    """
    found: dict[str, dict[tuple[float, float], float]] = {}
    for line in lines:
        place = number_of(line, "step"), number_of(line, "examples")
        if not all(map(math.isfinite, place)):
            continue
        for name, value in part_of(line, "evaluation").items():
            found.setdefault(str(name), {})[place] = finite_number(value)
    return tuple(
        EvaluationMetric(
            name,
            np.array([step for step, _ in values]),
            np.array([examples for _, examples in values]),
            np.array(list(values.values())),
        )
        # a stable sort, so that all but the loss stay in the journal's order
        for name, values in sorted(found.items(), key=lambda item: item[0] != "loss")
    )
