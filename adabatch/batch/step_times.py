"""How long a step takes: a model of compute and all-reduce, fitted to steps that were timed.

With accumulation steps ``k``, micro-batch size ``m`` and data-parallel size ``p``,

    seconds = overhead + k (micro_batch + example m) + 2 (p - 1) message + 2 (p - 1) / p gradient

which is the cost of every step (the optimizer, the loop, the start of a reduction), the costs of a micro-batch and of
an example, and a ring all-reduce in the alpha-beta model: ``2 (p - 1)`` messages, each of which costs alpha, and
``2 (p - 1) / p`` of the gradient's bytes, whose sending takes beta. All five are times and never negative.

The model is linear in the fixed cost of a batch and its cost per example, which the choice of a batch size needs. It
ignores that a reduction may overlap with the backward: overlap shows as a smaller message cost. With a single world
size, the three constants of the step cannot be distinguished, and need not be.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from adabatch.batch.plan import BatchPlan

SAMPLES = 5
"""Timed steps kept per plan. Their median is its time, so that a pause (a checkpoint, an evaluation) hardly changes
it."""

PLANS = 16
"""Number of latest plans kept: more than the model has unknowns, and few enough to save as plain numbers."""

RESOLUTION = 1e-2
"""Relative difference below which times of different plans count as equal: no timing is exact to a percent."""


class StepTimeModel(NamedTuple):
    """The cost of a step, in seconds; the head of this module has the formula.

    Args:
        overhead: of a step.
        micro_batch: of a micro-batch.
        example: of an example in it.
        message: of a message of the all-reduce (alpha).
        gradient: of sending the gradient once (beta).
    """

    overhead: float
    micro_batch: float
    example: float
    message: float
    gradient: float

    def step(self, dp_size: int) -> float:
        """The cost of a step without its micro-batches."""
        sent = 2 * (dp_size - 1)
        return self.overhead + sent * self.message + sent / dp_size * self.gradient

    def seconds(self, micro_batch_size: float, accumulation_steps: float, dp_size: int) -> float:
        """The time of a step, also for sizes between those that can be run."""
        return self.step(dp_size) + accumulation_steps * (self.micro_batch + self.example * micro_batch_size)


class PlanTimes(NamedTuple):
    """The last timed steps of a plan, in seconds."""

    micro_batch_size: int
    accumulation_steps: int
    dp_size: int
    seconds: tuple[float, ...]

    @property
    def plan(self) -> tuple[int, int, int]:
        """The plan."""
        return self[:3]


@dataclass(frozen=True)
class StepTimes:
    """The times so far: plain numbers, the plan timed last at the end."""

    of: tuple[PlanTimes, ...] = ()

    def after(self, plan: BatchPlan, seconds: float) -> StepTimes:
        """The times with one more step of ``plan``, which took ``seconds`` (positive)."""
        key = (plan.micro_batch_size, plan.accumulation_steps, plan.dp_size)
        past = next((times.seconds for times in self.of if times.plan == key), ())
        # moved to the end, because the plans that ran last are those that stay
        others = [times for times in self.of if times.plan != key]
        return StepTimes((*others, PlanTimes(*key, (*past, seconds)[-SAMPLES:]))[-PLANS:])

    @property
    def sizes(self) -> frozenset[int]:
        """The global batch sizes that were timed, in examples."""
        return frozenset(m * k * p for m, k, p, _ in self.of)

    @cached_property
    def model(self) -> StepTimeModel:
        """The model with the least squares of relative errors, and the least norm among several.

        If the timed plans cannot distinguish two costs, the time is divided equally between them. With a single plan
        the model therefore predicts that a larger batch would save time; the larger batch is then tried, and timed.

        Raises:
            ValueError: if nothing was timed.
        """
        if not self.of:
            raise ValueError("a model of step times needs a timed step")
        rows = [(1.0, k, k * m, 2.0 * (p - 1), 2.0 * (p - 1) / p) for m, k, p, _ in self.of]
        times = np.array([statistics.median(seconds) for *_, seconds in self.of])
        # relative errors: large batches take many times as long, and would alone decide a fit of seconds
        shares = np.array(rows) / times[:, None]
        # columns of one size, since lstsq's rcond compares singular values over all of them
        scale = shares.max(axis=0)
        used = np.flatnonzero(scale > 0)  # a single process sends nothing
        found = np.zeros(len(scale))
        while used.size:
            solved = np.linalg.lstsq(shares[:, used] / scale[used], np.ones(len(times)), rcond=RESOLUTION)[0]
            if solved.min() >= 0:
                found[used] = solved / scale[used]
                break
            used = np.delete(used, np.argmin(solved))  # times are not negative: the nearest is 0
        return StepTimeModel(*found.tolist())

    def state_dict(self) -> list[list[Any]]:
        """One row per plan, of numbers and lists."""
        return [[m, k, p, list(seconds)] for m, k, p, seconds in self.of]

    @classmethod
    def from_state_dict(cls, rows: Sequence[Sequence[Any]]) -> StepTimes:
        """The inverse of ``state_dict``."""
        return cls(tuple(PlanTimes(m, k, p, tuple(seconds)) for m, k, p, seconds in rows))
