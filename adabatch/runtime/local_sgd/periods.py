"""How many local steps a round has, the H of local SGD: pure functions of what is known when the round begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from adabatch.arguments import MOST_STEPS, check_fields, shown
from adabatch.batch.plan import Duration, Progress, check_milestones

NEVER = MOST_STEPS
"""The longest round, of more local steps than any run has: it ends with the training."""


class RoundStart(NamedTuple):
    """What is known when a round begins.

    Args:
        progress: what the run's applied updates consumed so far.
        lr: the largest learning rate of the optimizer's groups in the first local step.
        peak_lr: the same without the shape: the base LR times the batch factor.
    """

    progress: Progress
    lr: float
    peak_lr: float


@runtime_checkable
class Period(Protocol):
    """Decides how many local steps a round has."""

    @property
    def durations(self) -> tuple[Duration, ...]:
        """The durations with which it compares progress."""
        ...

    def local_steps(self, start: RoundStart) -> int:
        """Local steps of the round that begins, at least 1."""
        ...


def check_period(name: str, steps: int) -> None:
    """Checks a number of local steps.

    Raises:
        ValueError: if it is not a whole number of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(
            f"{name} must be a whole number of at least 1 local step, got {shown(steps)}: 1 averages at every step, "
            f"8 at every eighth"
        )


@dataclass(frozen=True)
class Fixed:
    """Always the same number of local steps; a plain number means the same.

    Raises:
        ValueError: if the number is below 1.
    """

    sync_every: int
    durations: ClassVar[tuple[Duration, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_period("sync_every", self.sync_every)

    def local_steps(self, start: RoundStart) -> int:
        """The constant."""
        return self.sync_every


@dataclass(frozen=True)
class Change:
    """From ``after`` on, rounds of ``sync_every`` local steps."""

    after: Duration
    sync_every: int

    def __post_init__(self) -> None:
        check_fields(self)
        check_period("sync_every", self.sync_every)


@dataclass(frozen=True)
class Table:
    """A first number of local steps, then another from each milestone on.

    A milestone inside a round counts from the next round on.

    Args:
        first: local steps of a round until the first milestone.
        then: the milestones, ascending, all in one unit.

    Raises:
        ValueError: if a number is below 1, or milestones have different units or do not ascend.
    """

    first: int
    then: Sequence[Change]

    def __post_init__(self) -> None:
        check_fields(self)
        check_period("first", self.first)
        check_milestones("a table", self.durations)

    @property
    def durations(self) -> tuple[Duration, ...]:
        """The milestones."""
        return tuple(change.after for change in self.then)

    def local_steps(self, start: RoundStart) -> int:
        """The number after the last milestone that was passed."""
        steps = self.first
        for change in self.then:
            # no break: a long round may have passed several
            if start.progress.reached(change.after):
                steps = change.sync_every
        return steps


@dataclass(frozen=True)
class Quadratic:
    """Rounds that grow as the learning rate falls: ``H = max(base, floor((alpha / lr)^2))``.

    During the warm-up the learning rate is small for another reason. The rule then uses the peak rate, and H is that of
    the first round after the warm-up. With a rate of zero the rest of the run is one round.

    Args:
        alpha: growth coefficient, in units of the learning rate: at ``lr = alpha`` the rule asks for one step, at a
            quarter of it for sixteen. It must be tuned.
        base: smallest number of local steps in a round.
        warmup: length of the learning rate's warm-up.
        longest: largest number of local steps in a round; None for no limit.

    Raises:
        ValueError: if ``alpha`` is not positive, or ``base`` is below 1 or above ``longest``.

    Source: Gu, Lyu, Arora, Zhang, Huang 2024, "A Quadratic Synchronization Rule for Distributed Deep Learning".
    """

    alpha: float
    base: int
    warmup: Duration | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a positive number, in units of the learning rate, got {self.alpha}")
        check_period("base", self.base)
        if self.longest is not None:
            check_period("longest", self.longest)
        if self.longest is not None and self.longest < self.base:
            raise ValueError(f"longest={self.longest} is below base={self.base}: no round could have its length")

    @property
    def durations(self) -> tuple[Duration, ...]:
        """The warm-up, if there is one."""
        return () if self.warmup is None else (self.warmup,)

    def local_steps(self, start: RoundStart) -> int:
        """The rule's number, inside ``base`` and ``longest``."""
        warming_up = self.warmup is not None and not start.progress.reached(self.warmup)
        lr = start.peak_lr if warming_up else start.lr
        most = NEVER if self.longest is None else self.longest
        # (alpha / lr)^2 >= most, without dividing by a rate of zero.
        if self.alpha >= math.sqrt(most) * lr:
            return most
        return max(self.base, math.floor((self.alpha / lr) ** 2))
