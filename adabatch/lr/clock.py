"""What progress counts: the way from examples, tokens or steps to the fraction that a shape reads.

Two conventions, both at work here:

- The shape is read at the *left end* of the interval that a step consumes: the first step runs at shape(0), and the
  last batch, which may overshoot the total, still runs above shape(1). Progress is clamped at 1 afterwards.
- Warm-up is read at the *right end*: the first step already moves, and the step that completes the warm-up runs at 1.

Warm-up may have another unit than the total (steps suit the optimizer's state, examples suit a growing batch). The
shape starts when the warm-up ends, and runs over what is left of the total then; that instant is the ``anchor``.
"""

from __future__ import annotations

from dataclasses import dataclass

from adabatch.batch.plan import Duration, Progress


@dataclass(frozen=True)
class Clock:
    """Where a run stands between its first step and its total.

    Args:
        total: length of the run.
        warmup: length of the warm-up, in its own unit; None for none.

    Raises:
        ValueError: a total of no length, or a warm-up in the total's unit that is not shorter than it.
    """

    total: Duration
    warmup: Duration | None = None

    def __post_init__(self) -> None:
        if self.total.count == 0:
            raise ValueError("the total must have a length, got 0")
        warmup = self.warmup
        if warmup is not None and warmup.unit == self.total.unit and warmup.count >= self.total.count:
            raise ValueError(f"the warm-up of {warmup} must be shorter than the total of {self.total}")

    def warming_up(self, progress: Progress) -> bool:
        """Whether the next step still belongs to the warm-up."""
        return self.warmup is not None and not progress.reached(self.warmup)

    def warmup_fraction(self, after_next: Progress) -> float:
        """Fraction of the warm-up that is over after the next step, in (0, 1]."""
        if self.warmup is None or self.warmup.count == 0:
            return 1.0
        return min(1.0, after_next.count(self.warmup.unit) / self.warmup.count)

    def anchor(self, progress: Progress) -> int:
        """Where the shape starts, in the total's unit, given progress at or after the end of the warm-up.

        In the total's own unit that is the end of the warm-up exactly, however far the last batch overshot it.
        """
        if self.warmup is None:
            return 0
        if self.warmup.unit == self.total.unit:
            return self.warmup.count
        return progress.count(self.total.unit)

    def fraction(self, progress: Progress, anchor: int = 0) -> float:
        """Progress of the shape in [0, 1]: what is consumed since ``anchor`` over what was left there."""
        left = self.total.count - anchor
        if left <= 0:
            return 1.0
        return min(1.0, max(0.0, (progress.count(self.total.unit) - anchor) / left))
