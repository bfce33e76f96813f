"""The vocabulary of sizes: the composition of a step, the progress of a run, and durations with a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from adabatch.arguments import allowed_by, check_fields, conform, require, require_one_of, shown

Unit = Literal["examples", "tokens", "steps", "gain_steps"]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The composition of one step: fixed before the step begins, the same on every rank.

    Args:
        micro_batch_size: examples in one forward and backward on one rank.
        accumulation_steps: micro-batches that each rank runs for the step.
        dp_size: ranks that see different data.

    Raises:
        ValueError: if a number is below 1.
    """

    micro_batch_size: int
    accumulation_steps: int
    dp_size: int

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("micro_batch_size", "accumulation_steps", "dp_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))

    @property
    def global_batch_size(self) -> int:
        """Examples of the whole step, over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.dp_size

    @property
    def num_parts(self) -> int:
        """Partial gradients whose spread can be measured."""
        return self.accumulation_steps * self.dp_size


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit; made by ``examples``, ``tokens``, ``steps`` and ``gain_steps``.

    Raises:
        ValueError: if the count is negative or not whole, or the unit is unknown.
    """

    count: int
    unit: Unit

    def __post_init__(self) -> None:
        require_one_of("unit", self.unit, Unit)
        count: float = conform("the count of a duration", self.count, allowed_by(float))
        if not (math.isfinite(count) and count == int(count)):
            raise ValueError(f"a duration must be a whole number of {self.unit}, got {self.count!r}")
        object.__setattr__(self, "count", int(count))  # users write 6e6
        if self.count < 0:
            raise ValueError(f"a duration must not be negative, got {self.count} {self.unit}")

    def __str__(self) -> str:
        return f"{self.count:,} {self.unit}"


def examples(count: int) -> Duration:
    """A duration of ``count`` examples over all ranks."""
    return Duration(count, "examples")


def tokens(count: int) -> Duration:
    """A duration of ``count`` tokens over all ranks."""
    return Duration(count, "tokens")


def steps(count: int) -> Duration:
    """A duration of ``count`` optimizer steps."""
    return Duration(count, "steps")


def gain_steps(count: int) -> Duration:
    """A duration of ``count`` gain-steps: steps of the reference batch size that would have made the same progress.

    A step of ``b`` examples counts as ``(noise / b_ref + signal) / (noise / b + signal)`` gain-steps: ``b / b_ref`` if
    noise dominates, and 1 if signal dominates (AdaScale: Johnson et al. 2020, section 3).
    """
    return Duration(count, "gain_steps")


def check_milestones(what: str, ends: Sequence[Duration]) -> None:
    """Raises a ValueError unless the milestones of a table share one unit and ascend."""
    listed = ", ".join(map(str, ends))
    require(len({end.unit for end in ends}) <= 1, f"the milestones of {what} must share one unit", listed)
    require(all(a.count < b.count for a, b in pairwise(ends)), f"the milestones of {what} must ascend", listed)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run: what its applied updates consumed, over all ranks.

    ``tokens`` is None if they are not counted, ``gain_steps`` if the noise is not measured.
    """

    examples: int = 0
    steps: int = 0
    tokens: int | None = None
    gain_steps: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("examples", "steps", "tokens", "gain_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must not be negative", value)

    def after(self, num_examples: int, num_tokens: int | None = None, gain: float | None = None) -> Progress:
        """The progress after one more applied update.

        Raises:
            ValueError: if tokens or gain-steps are counted in some updates only.
        """
        for name, so_far, more in (("tokens", self.tokens, num_tokens), ("gain_steps", self.gain_steps, gain)):
            if (so_far is None) != (more is None) and not (so_far is None and self.steps == 0):
                only = "not in the updates before" if so_far is None else f"which were {so_far} before it"
                raise ValueError(
                    f"update {self.steps + 1} counts {shown(more)} {name}, {only}: count them in all updates or in none"
                )
        return Progress(
            examples=self.examples + num_examples,
            steps=self.steps + 1,
            tokens=None if num_tokens is None else (self.tokens or 0) + num_tokens,
            gain_steps=None if gain is None else (self.gain_steps or 0.0) + gain,
        )

    def count(self, unit: Unit) -> float:
        """The progress in ``unit``.

        Raises:
            ValueError: if the unit is tokens or gain-steps, and these are not counted.
        """
        if unit == "examples":
            return self.examples
        if unit == "steps":
            return self.steps
        if unit == "tokens" and self.tokens is not None:
            return self.tokens
        if unit == "gain_steps" and self.gain_steps is not None:
            return self.gain_steps
        way_out = "tokens_per_example=" if unit == "tokens" else "measure=Measure(monitor=True) or lr_rule='gain'"
        raise ValueError(
            f"this run does not count {unit}: pass {way_out} to AdaptiveBatch, "
            f"or give the duration in examples or steps"
        )

    def reached(self, duration: Duration) -> bool:
        """Whether ``duration`` is over."""
        return self.count(duration.unit) >= duration.count


def micro_batch_sizes(smallest: int, largest: int) -> tuple[int, ...]:
    """The few micro-batch sizes that a run may use, ascending: ``smallest``, its doubles below ``largest``, and
    ``largest``.

    With few sizes, compiled and autotuned kernels stay in their caches.

    Raises:
        ValueError: if ``smallest`` is below 1 or above ``largest``.
    """
    if not 1 <= smallest <= largest:
        raise ValueError(f"micro_batch_size must lie between 1 and max_micro_batch_size, got {smallest} and {largest}")
    # bit_length, not a logarithm, which may be off by one at a power of two
    doubled = {smallest << k for k in range((largest // smallest).bit_length())}
    return tuple(sorted(doubled | {largest}))


@dataclass(frozen=True, kw_only=True)
class PlanGrid:
    """The plans that a run can carry out.

    Args:
        dp_size: ranks that see different data.
        micro_sizes: micro-batch sizes that may be used, in examples.
        min_accumulation: least number of accumulation steps (2 on a single rank, so that there is a spread to measure).
    """

    dp_size: int
    micro_sizes: tuple[int, ...]
    min_accumulation: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("dp_size", "min_accumulation"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(
            len(self.micro_sizes) > 0 and min(self.micro_sizes) >= 1,
            "micro_sizes must be at least 1 example each",
            self.micro_sizes,
        )

    def next_above(self, size: int) -> int:
        """The smallest global batch size above ``size`` that can be run, in examples."""
        quanta = [micro * self.dp_size for micro in self.micro_sizes]
        return min(quantum * max(self.min_accumulation, size // quantum + 1) for quantum in quanta)

    def next_below(self, size: int) -> int:
        """The largest global batch size below ``size`` that can be run, in examples; 0 if there is none."""
        quanta = [micro * self.dp_size for micro in self.micro_sizes]
        counts = [(size - 1) // quantum for quantum in quanta]
        able = [q * count for q, count in zip(quanta, counts, strict=True) if count >= self.min_accumulation]
        return max(able, default=0)

    def nearest(
        self, wanted: float, *, min_size: float = 1, max_size: float = math.inf, tolerance: float = 0.0
    ) -> BatchPlan:
        """The plan nearest to a wanted global batch size, with the largest micro-batch that is near enough.

        Args:
            wanted: global batch size, in examples; may be fractional. If it is outside ``min_size`` and ``max_size``,
                the nearer of the two is used.
            min_size, max_size: smallest and largest global batch size of the plan, in examples.
            tolerance: relative error of the global batch size that is accepted in exchange for a larger micro-batch;
                0 takes the nearest size that can be run.

        Returns:
            The plan; its global batch size may differ from ``wanted``.

        Raises:
            ValueError: if no plan fits between ``min_size`` and ``max_size``, or ``wanted`` is NaN, or both ``wanted``
                and ``max_size`` are infinite.
        """
        goal = max(min(wanted, max_size), min_size)
        if not math.isfinite(goal):
            raise ValueError(f"the wanted global batch size of a plan must be finite, got {wanted}")
        best: tuple[float, BatchPlan] | None = None
        # Largest first, because the first plan within the tolerance is taken, and a step of few large micro-batches is
        # faster than one of many small ones.
        for micro in sorted(self.micro_sizes, reverse=True):
            quantum = micro * self.dp_size
            lowest = max(self.min_accumulation, math.ceil(min_size / quantum))
            # This micro-batch cannot make a batch below the limit at all.
            if lowest * quantum > max_size:
                continue
            count = max(round(goal / quantum), lowest)
            # Rounded up past the limit. One step less is still at least `lowest`, which was found to fit.
            if count * quantum > max_size:
                count = int(max_size // quantum)
            plan = BatchPlan(micro_batch_size=micro, accumulation_steps=count, dp_size=self.dp_size)
            error = abs(plan.global_batch_size - goal)
            if error <= tolerance * goal:
                return plan
            # Not <=: of two plans that are equally near, the one with the larger micro-batch stays.
            if best is None or error < best[0]:
                best = (error, plan)
        if best is None:
            raise ValueError(
                f"no batch of {self.dp_size} rank(s) x {self.min_accumulation} or more micro-batches of "
                f"{' or '.join(map(str, self.micro_sizes))} examples lies between {min_size} and {max_size}: "
                f"move the limits or use another micro_batch_size"
            )
        return best[1]
