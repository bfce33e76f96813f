"""The steps over which a schedule is evaluated: equal ones, or those of a recorded run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from adabatch.arguments import checked, require
from adabatch.lr.bound import BoundTerms, bound_terms, check_warmup
from adabatch.lr.function_shape import AnyShape
from adabatch.lr.recorded import Recorded, RecordedUnit
from adabatch.lr.refine import stretch
from adabatch.lr.shapes import FloatArray, warmup_factor

DISTANCE = 1.0
"""Distance from the start to a minimiser. It is never known, and only scales the results."""


class Horizon(NamedTuple):
    """Steps with their progress, batch factor and gradient norm.

    If the batch of a recorded run grew, its steps are unequal parts of its progress, its learning rate had a batch
    factor, and its gradient norms contain the noise of their batch. The bound uses all three as they were.

    Args:
        edges: what was consumed before each step and after the last, in the unit of progress, shape (num_steps + 1,).
        batch_factors: shape (num_steps,).
        norms: ``G_t``, shape (num_steps,).
    """

    edges: FloatArray
    batch_factors: FloatArray
    norms: FloatArray

    @classmethod
    @checked
    def of_equal_steps(cls, num_steps: int) -> Horizon:
        """Steps of one batch size, with gradient norm 1.

        Raises:
            ValueError: if there are no steps.
        """
        require(num_steps >= 1, "a schedule needs at least 1 step", num_steps)
        return cls(np.arange(num_steps + 1.0), np.ones(num_steps), np.ones(num_steps))

    @classmethod
    @checked
    def of_run(cls, recorded: Recorded, clock: RecordedUnit, reference: float) -> Horizon:
        """The steps of a run.

        Raises:
            ValueError: as for ``Recorded``, if the run has no usable norms.
        """
        # l2 whatever the optimizer: the bound is that of SGD, and a shape is compared by it, not trained with it
        norms = recorded.norms("l2").for_each(recorded.num_steps)
        return cls(recorded.edges(clock, reference), recorded.factor, norms)

    @property
    def num_steps(self) -> int:
        """Steps in all, warm-up included."""
        return len(self.norms)

    @checked
    def resampled(self, num_steps: int) -> Horizon:
        """The horizon with another number of steps; progress, batch factors and norms are functions of the share of the
        steps.

        Raises:
            ValueError: if there are no steps.
        """
        require(num_steps >= 1, "a schedule needs at least 1 step", num_steps)
        if num_steps == self.num_steps:
            return self
        # Not `stretch`, which keeps two ends and so refuses a horizon of a single step.
        share = np.linspace(0, self.num_steps - 1, num_steps)
        return Horizon(
            stretch(self.edges, num_steps + 1),
            np.interp(share, np.arange(self.num_steps), self.batch_factors),
            np.interp(share, np.arange(self.num_steps), self.norms),
        )

    @checked
    def factors(self, shape: AnyShape, *, warmup_steps: int = 0) -> FloatArray:
        """The factor on the base learning rate at each step, shape (num_steps,).

        Each step reads the progress made before it; for equal steps this is ``lr.discretize``. The shape runs over the
        steps after the warm-up, and the warm-up starts from zero.

        Raises:
            ValueError: if the warm-up leaves no step.
        """
        check_warmup(warmup_steps, self.num_steps)
        begin, end = self.edges[warmup_steps], self.edges[-1]
        # negative before `begin`, which a shape clamps to 0
        values = shape((self.edges[:-1] - begin) / (end - begin))
        if warmup_steps:
            # by steps, not by progress: a warm-up is for the optimizer's averages, which count steps
            values *= warmup_factor(np.arange(self.num_steps) / warmup_steps)
        return np.asarray(values * self.batch_factors)

    def terms(self, factors: FloatArray, *, until: int | None = None) -> BoundTerms:
        """The last-iterate bound of these factors, after the first ``until`` steps or after all."""
        return bound_terms(factors[:until], self.norms[:until], distance=DISTANCE)


class ScheduleBound(NamedTuple):
    """A shape over a horizon, and its last-iterate bound.

    Args:
        horizon: the steps.
        factors: on the base learning rate, at each step, shape (num_steps,).
        terms: of the bound after all steps.
    """

    horizon: Horizon
    factors: FloatArray
    terms: BoundTerms

    @checked
    def over_time(self, base_lr: float, *, points: int = 120) -> tuple[FloatArray, FloatArray]:
        """The bound if the run ended after t steps, for some t, which are denser towards the end; each takes O(t).

        Args:
            base_lr: base learning rate, in the unit of ``terms.best_base_lr``.
            points: largest number of values of t.

        Returns:
            The numbers of steps, and the bounds there, both of shape (num_points,).
        """
        total = self.horizon.num_steps
        # a warm-up from zero begins with a factor of 0, and there is no bound until the first move
        began = int(np.argmax(self.factors > 0)) + 1
        # denser towards the end, where a cooldown moves the bound within a few steps; and not in the first fiftieth,
        # whose bounds are so large that the rest of a picture would be flat
        share = 1 - (1 - np.linspace(0, 1, points)) ** 2
        times = np.unique(np.clip(np.round(share * total).astype(np.int64), max(began, total // 50), total))
        bounds = [self.horizon.terms(self.factors, until=int(t)).at(base_lr) for t in times]
        return times.astype(np.float64), np.array(bounds)


@checked
def schedule_bound(shape: AnyShape, horizon: Horizon, *, warmup_steps: int = 0) -> ScheduleBound:
    """The bound of a shape over a horizon, after a linear warm-up from zero.

    Ratios of bounds and of best base learning rates rank shapes; the absolute values contain the unknown distance to a
    minimiser, which is set to 1.

    Raises:
        ValueError: if the warm-up leaves no step.

    Source: Defazio et al. 2023, arXiv:2310.07831, Theorem 10; as a model of schedules: Schaipp et al. 2025,
    arXiv:2501.18965.
    """
    factors = horizon.factors(shape, warmup_steps=warmup_steps)
    return ScheduleBound(horizon, factors, horizon.terms(factors))
