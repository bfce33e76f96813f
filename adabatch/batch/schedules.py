"""Batch sizes that read only progress: criteria that need no probe, and floors and ceilings for those that do.

A floor or ceiling is passed as a limit: ``Limits(min=LinearRamp(...), max=4096)``.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from adabatch.arguments import check_fields, require
from adabatch.batch.criteria import Observation
from adabatch.batch.needs import Needs
from adabatch.batch.plan import Duration, Progress, check_milestones


class Schedule(ABC):
    """A global batch size as a function of progress."""

    needs: ClassVar[Needs] = Needs()

    @property
    def fixed_sizes(self) -> tuple[int, ...]:
        """The global batch sizes that a run must be able to run exactly; empty if the size changes continuously."""
        return ()

    @abstractmethod
    def size(self, progress: Progress) -> float:
        """The global batch size at this progress, in examples."""

    @final
    def wanted(self, observation: Observation) -> float:
        """The size at this progress, as for a criterion."""
        return self.size(observation.progress)


def _check_size(name: str, size: float) -> None:
    require(1 <= size < math.inf, f"{name} must be a global batch size of at least 1 example", size)


@dataclass(frozen=True)
class Constant(Schedule):
    """Always the same global batch size.

    Raises:
        ValueError: if the size is below 1.
    """

    global_batch_size: int

    def __post_init__(self) -> None:
        check_fields(self)
        _check_size("global_batch_size", self.global_batch_size)

    @property
    def fixed_sizes(self) -> tuple[int, ...]:
        """The constant."""
        return (self.global_batch_size,)

    def size(self, progress: Progress) -> float:
        """The constant."""
        return self.global_batch_size


@dataclass(frozen=True)
class Stage:
    """From ``after`` on, batches of ``global_batch_size`` examples."""

    after: Duration
    global_batch_size: int

    def __post_init__(self) -> None:
        check_fields(self)
        _check_size("global_batch_size", self.global_batch_size)


@dataclass(frozen=True)
class Stages(Schedule):
    """A table: a first size, then another from each milestone on.

    Milestones are compared with >=, so a large batch may jump over several; the last one passed counts.

    Args:
        first: global batch size until the first milestone, in examples.
        then: the milestones, ascending, all in one unit.

    Raises:
        ValueError: if a size is below 1, or milestones have different units or do not ascend.
    """

    first: int
    then: Sequence[Stage]

    def __post_init__(self) -> None:
        check_fields(self)
        _check_size("first", self.first)
        check_milestones("stages", [stage.after for stage in self.then])

    @property
    def fixed_sizes(self) -> tuple[int, ...]:
        """All sizes of the table."""
        return (self.first, *(stage.global_batch_size for stage in self.then))

    def size(self, progress: Progress) -> float:
        """The size of the last milestone passed."""
        size = self.first
        # no break: one large batch may have passed several milestones
        for stage in self.then:
            if progress.reached(stage.after):
                size = stage.global_batch_size
        return size


@dataclass(frozen=True)
class LinearRamp(Schedule):
    """From ``first`` to ``last`` in a straight line over a duration, then constant.

    Args:
        first, last: global batch sizes in examples.
        over: how long the ramp takes.

    Raises:
        ValueError: if a size is below 1, or the ramp has no length.

    Source: the batch ramp of GPT-3 (Brown et al. 2020, appendix B), in any unit.
    """

    first: int
    last: int
    over: Duration

    def __post_init__(self) -> None:
        check_fields(self)
        _check_size("first", self.first)
        _check_size("last", self.last)
        if self.over.count == 0:
            raise ValueError("the ramp must have a length, got over=0")

    def size(self, progress: Progress) -> float:
        """The size on the line."""
        fraction = min(1.0, progress.count(self.over.unit) / self.over.count)
        return self.first + (self.last - self.first) * fraction


@dataclass(frozen=True)
class Seesaw(Schedule):
    """A decay of the learning rate traded for growth of the batch.

    Each time ``shape`` has fallen by another factor ``alpha``, the batch grows by ``alpha`` instead, and the learning
    rate falls only by ``sqrt(alpha)``, so that Adam's invariant ``lr / sqrt(b)`` falls as under ``shape`` alone. It is
    meant for batches below the critical batch size, where noise dominates. The run has no other decay. Its rule is
    "sqrt" (the default with this schedule), or "linear" for SGD, whose invariant is ``lr / b``: the batch then takes
    over the whole decay, within its limits. The learning rate takes the rest: its factor is that of the rule, times
    ``lr_decay``.

    Args:
        first: global batch size at the start, in examples.
        shape: the learning-rate schedule to be replaced: progress in [0, 1] -> factor, not rising.
        total: length of training over which ``shape`` runs.
        alpha: growth at each cut, above 1.

    Raises:
        ValueError: if a size is below 1, ``alpha`` is not above 1, or the total has no length.

    Source: Seesaw, arXiv 2510.14717, 2025; for SGD: Smith et al. 2018.
    """

    first: int
    shape: Callable[[float], float]
    total: Duration
    alpha: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_size("first", self.first)
        require(1 < self.alpha < math.inf, "alpha must be above 1 and finite", self.alpha)
        if self.total.count == 0:
            raise ValueError("the total must have a length, got 0")

    def cuts(self, progress: Progress) -> float:
        """How often ``shape`` has fallen by ``alpha`` so far; infinite if it is zero."""
        factor = self.shape(min(1.0, progress.count(self.total.unit) / self.total.count))
        if factor < sys.float_info.min:  # zero, or so close to it that its inverse overflows
            return math.inf
        # The small offset keeps rounding from missing an exact cut (0.5, 0.25, ...).
        return max(0, math.floor(-math.log(factor) / math.log(self.alpha) + 1e-9))

    def size(self, progress: Progress) -> float:
        """``first * alpha ** cuts``; infinite, and so the upper limit, if the shape is zero."""
        return float(self.first * self.alpha ** self.cuts(progress))

    def lr_decay(self, progress: Progress) -> float:
        """The decay of ``shape`` so far, in steps of ``alpha``, which batch and rate share: ``alpha ** -cuts``."""
        return float(self.alpha ** -self.cuts(progress))

    def lr_factor(self, progress: Progress) -> float:
        """The part of the decay that remains for the learning rate if the batch follows: ``alpha ** (-cuts / 2)``.

        If the batch is at its limit and cannot follow, it is ``lr_decay * sqrt(b / first)``.
        """
        return float(self.alpha ** (-self.cuts(progress) / 2))
