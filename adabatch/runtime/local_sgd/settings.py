"""The settings of local SGD, checked, and the round that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, NamedTuple

from adabatch.arguments import require, shown
from adabatch.batch.plan import Duration
from adabatch.runtime.local_sgd.compression import Compression
from adabatch.runtime.local_sgd.outer import Average, OuterOptimizer
from adabatch.runtime.local_sgd.periods import Fixed, Period, RoundStart, Table, check_period
from adabatch.runtime.local_sgd.probe import Spread

AverageWeights = Literal["examples", "equal"]
"""What determines the weight of a worker in the average."""

MeasuredStep = Literal["first", "last"]
"""The local step of a round at which the gradient is measured."""


class Round(NamedTuple):
    """The properties of a round, which are fixed when it begins.

    Args:
        local_steps: steps of each worker until the average.
        lr: largest learning rate of the optimizer's groups at its first step.
        outer: the outer optimizer at its end.
        compression: of what is exchanged at its end.
        overlap: steps after which an average is applied.
        by_gradient: whether the workers average the gradient of its only step instead of the parameters after it.
    """

    local_steps: int
    lr: float
    outer: OuterOptimizer
    compression: Compression
    overlap: int
    by_gradient: bool

    @property
    def needs_anchor(self) -> bool:
        """Whether its end needs the parameters at its beginning."""
        return self.outer.needs_anchor or self.compression != "none"


@dataclass(frozen=True, kw_only=True)
class LocalSGDSettings:
    """The arguments of ``LocalSGD``; see there.

    Raises:
        ValueError: if a number is out of its range, or two settings exclude each other.
        TypeError: if the period, the outer optimizer or a duration has another type.
    """

    period: Period
    outer: OuterOptimizer
    warmup: Duration | None
    average_state: bool
    compression: Compression
    weights: AverageWeights
    measure: MeasuredStep
    spread: Spread
    fragments: int
    overlap: int
    mix: float
    by_speed: bool = False

    def __post_init__(self) -> None:
        # A class passes for a Period too, because it has the attributes that the protocol asks for.
        if isinstance(self.period, type) or not isinstance(self.period, Period):
            raise TypeError(
                f"sync_every must be a number of local steps, or Fixed, Table or Quadratic of adabatch.local_sgd, got "
                f"{shown(self.period)}"
            )
        if isinstance(self.outer, type) or not isinstance(self.outer, OuterOptimizer):
            raise TypeError(
                f"outer must be Average(), Nesterov() or SlowMo() of adabatch.local_sgd, got {shown(self.outer)}"
            )
        if self.warmup is not None and not isinstance(self.warmup, Duration):
            raise TypeError(
                f"warmup must be a duration, such as adabatch.steps({shown(self.warmup)}), got {shown(self.warmup)}"
            )
        require(self.fragments >= 1, "fragments must be at least 1", self.fragments)
        if isinstance(self.period, Fixed) and self.fragments > self.period.sync_every:
            raise ValueError(
                f"fragments must be at most sync_every={self.period.sync_every}, got {self.fragments}: each has a step "
                f"of its own in a round"
            )
        require(self.overlap >= 0, "overlap must be at least 0 steps", self.overlap)
        if isinstance(self.period, Fixed) and 0 < self.period.sync_every <= self.overlap:
            raise ValueError(
                f"overlap must be below sync_every={self.period.sync_every}, got {self.overlap}: an average is applied "
                f"before the next one of the same parameters begins"
            )
        require(0 <= self.mix < 1, "mix must be in [0, 1)", self.mix)
        if self.by_speed and not isinstance(self.period, Fixed):
            raise ValueError(
                f"by_speed=True counts the local steps of the fastest worker, which must be a number, got sync_every="
                f"{self.period}: workers that have taken different numbers of steps would come to its changes in "
                f"different rounds"
            )
        if self.by_speed and self.overlap:
            raise ValueError(
                f"by_speed=True cannot be combined with overlap={self.overlap}, which is counted in each worker's own "
                f"steps: leave one of the two out"
            )
        if self.overlap and self.average_state:
            raise ValueError(
                f"average_state cannot be combined with overlap={self.overlap}, which would replace the optimizer's "
                f"state by an older one: leave one of the two out"
            )

    @property
    def durations(self) -> tuple[Duration, ...]:
        """The durations with which progress is compared."""
        return (*self.period.durations, *(() if self.warmup is None else (self.warmup,)))

    @property
    def without_rate(self) -> bool:
        """Whether nothing reads the learning rate."""
        return isinstance(self.period, Fixed | Table) and isinstance(self.outer, Average)

    @property
    def comes_together(self) -> bool:
        """Whether all workers hold the same parameters after each round."""
        return self.fragments == 1 and self.overlap == 0

    def begin(self, start: RoundStart, *, workers_agree: bool) -> Round:
        """The round that begins.

        Args:
            start: what is known at its beginning.
            workers_agree: whether parameters and optimizer states of all workers are equal, so that the same gradient
                gives the same step on each of them.

        Raises:
            ValueError: if the user's own period does not give a number of steps.
        """
        if self.warmup is not None and not start.progress.reached(self.warmup):
            # synchronous training, with which post-local SGD begins (Lin et al. 2020, arXiv:1808.07217)
            return Round(1, start.lr, Average(), "none", 0, workers_agree)
        local_steps = self.period.local_steps(start)
        # again, for a period of the user's own, whose numbers nobody has seen yet
        check_period("sync_every", local_steps)
        plain = isinstance(self.outer, Average) and self.compression == "none"
        by_gradient = local_steps == 1 and plain and workers_agree
        # the mean gradient is there before the update, so that no average is left to arrive later
        overlap = 0 if by_gradient else self.overlap
        return Round(local_steps, start.lr, self.outer, self.compression, overlap, by_gradient)

    def texts(self) -> dict[str, str]:
        """The settings as text by name, to be compared between ranks and with those of a saved run."""
        return {name: _words(getattr(self, name)) for name in self.__dataclass_fields__}


def period_of(sync_every: int | Period | Any) -> Period:
    """A period; a number means rounds of that many local steps."""
    # A float too, for the sake of the error of Fixed, which says what is wrong with it.
    return Fixed(sync_every) if isinstance(sync_every, int | float) else sync_every  # type: ignore[arg-type]


def _words(setting: object) -> str:
    # only the name for the user's own class: its repr may contain an address, which differs between ranks
    plain = setting is None or is_dataclass(setting) or isinstance(setting, str | int | float)
    return repr(setting) if plain else type(setting).__name__
