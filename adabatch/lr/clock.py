"""What progress counts: from examples, tokens or steps to the fraction that a shape reads.

Two conventions are used:

- The shape is read at the *left end* of the interval that a step consumes: the first step runs at shape(0), and the
  last batch, which may overshoot the total, still runs above shape(1). Progress is clamped at 1 afterwards.
- Warm-up is read at the *right end*: the first step already has a positive rate, and the step that completes the
  warm-up runs at 1.

Warm-up may have another unit than the total (steps suit the optimizer's state, examples suit a growing batch). The
shape starts when the warm-up ends, and runs over the rest of the total; its starting point is the ``anchor``.
"""

from __future__ import annotations

from dataclasses import dataclass

from adabatch.batch.plan import Duration, Progress


def share_of(total: Duration, share: float) -> Duration:
    """A part of a duration, in its unit, rounded to a whole number: 0.1 of 6,000,000 examples is 600,000 examples.

    Raises:
        ValueError: if the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"a share of the total must lie in [0, 1), got {share}: give a length as a duration, such as "
            f"warmup=adabatch.steps(100)"
        )
    return Duration(round(share * total.count), total.unit)


@dataclass(frozen=True)
class Anchor:
    """The point from which the shape's progress is counted.

    Args:
        count: progress at this point, in the total's unit.
        fraction: progress of the shape at this point, in [0, 1]; above 0 if the total was changed during the run.
        gain_steps: gain-steps at this point; read by the gain clock only.
    """

    count: float
    fraction: float
    gain_steps: float = 0.0


BEGINNING = Anchor(0, 0.0)
"""The first step of a run without warm-up."""


@dataclass(frozen=True)
class Clock:
    """The progress of a run between its first step and its total.

    Args:
        total: length of the run.
        warmup: length of the warm-up, in its own unit; None for none.

    Raises:
        ValueError: if the total has no length, or a warm-up in the same unit is not shorter.
    """

    total: Duration
    warmup: Duration | None = None

    def __post_init__(self) -> None:
        if self.total.count == 0:
            raise ValueError("the total must have a length, got 0")
        warmup = self.warmup
        # in two units nobody can tell beforehand which of the two is shorter
        if warmup is not None and warmup.unit == self.total.unit and warmup.count >= self.total.count:
            raise ValueError(f"the warm-up of {warmup} must be shorter than the total of {self.total}")

    def warming_up(self, progress: Progress) -> bool:
        """Whether the next step still belongs to the warm-up."""
        return self.warmup is not None and not progress.reached(self.warmup)

    def warmup_fraction(self, after_next: Progress) -> float:
        """Fraction of the warm-up that is over after the next step, in (0, 1]."""
        if self.warmup is None or self.warmup.count == 0:
            return 1.0
        # after the step, because before the first one nothing is consumed: its rate would be zero, and the step lost
        return min(1.0, after_next.count(self.warmup.unit) / self.warmup.count)

    def anchor(self, progress: Progress, gain_per_unit: float = 0.0) -> Anchor:
        """Where the shape starts, given progress at or after the end of the warm-up.

        In the total's own unit that is the end of the warm-up exactly, however far the last batch overshot it.

        Args:
            progress: what is consumed.
            gain_per_unit: gain of a step per unit of the total that it consumes; read by the gain clock only.
        """
        if self.warmup is None:
            return BEGINNING
        count, gain_steps = progress.count(self.total.unit), progress.gain_steps or 0.0
        # what the warm-up's last batch overshot cannot be told in another unit
        if self.warmup.unit != self.total.unit:
            return Anchor(count, 0.0, gain_steps)
        overshot = count - self.warmup.count
        # exact in the total's unit: the schedule then does not depend on the batch size during the warm-up
        return Anchor(self.warmup.count, 0.0, gain_steps - overshot * gain_per_unit)

    def fraction(self, progress: Progress, anchor: Anchor = BEGINNING) -> float:
        """Progress of the shape in [0, 1]: linear from the anchor's fraction to 1 at the total."""
        left = self.total.count - anchor.count
        # a warm-up in another unit may have used up the whole total
        if left <= 0:
            return 1.0
        share = min(1.0, max(0.0, (progress.count(self.total.unit) - anchor.count) / left))
        return anchor.fraction + (1 - anchor.fraction) * share

    def gain_fraction(self, progress: Progress, gain_per_unit: float, anchor: Anchor, passed: float) -> float:
        """Progress of the shape on the gain clock, for a total that is given in another unit.

        With ``tau`` gain-steps since the anchor and ``rem = (total - done) * gain_per_unit`` to come at the present
        gain, the fraction is ``tau / (tau + rem)``. It does not need the number of steps, and equals the fraction of
        the examples if noise dominates. It would decrease when the batch grows, and stays constant instead.

        Args:
            progress: what is consumed; must count gain-steps.
            gain_per_unit: gain of a step per unit of the total that it consumes.
            anchor: where the shape started.
            passed: the fraction of the step before.

        Source: from Defazio et al. 2023 (section 3) with the gradient norm of a batch; AdaScale's own bookkeeping.
        """
        # at the present gain, since nobody knows the noise to come: a better guess would have to be tuned itself
        remaining = max(0.0, self.total.count - progress.count(self.total.unit)) * gain_per_unit
        done = progress.count("gain_steps") - anchor.gain_steps
        if done + remaining <= 0:
            return 1.0
        share = min(1.0, max(0.0, done / (done + remaining)))
        # A growing batch would move the fraction back, and the learning rate up again.
        return max(passed, anchor.fraction + (1 - anchor.fraction) * share)
