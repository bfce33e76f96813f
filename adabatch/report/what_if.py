"""What a run would have cost with other batch sizes, computed from its journal alone. Pure.

A step of b examples at the noise scale B makes as much progress as ``p = b / (1 + b / B)`` examples in small batches.
The same progress in batches of b' takes ``p / b' + p / B`` steps and ``p (1 + b' / B)`` examples (McCandlish et al.
2018, section 2). So a journal with b and B of each step tells what any other b' would have cost.

This assumes (`ASSUMPTIONS`, which a reader must be told) that the noise scale depends on the progress and not on the
batch, that each batch has the learning rate that is right for it, and that the choice is followed at once, within the
limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np

from adabatch.batch.criteria import Criterion, NoiseScale, NormTest, Observation, StepPrice, resting_size
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import Duration, Progress
from adabatch.batch.schedules import LinearRamp, Schedule, Stage, Stages
from adabatch.report.evaluations import Floats
from adabatch.report.steps import RunSteps, filled

ChoiceKind = Literal["eta", "multiple", "step_price", "constant", "table", "ramp"]

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "eta": "norm test, eta {}",
        "multiple": "{} x noise scale",
        "step_price": "step price {}",
        "constant": "constant {}",
    }
)

USAGE: Mapping[str, str] = MappingProxyType(
    {
        **{each: f"{each}=NUMBER" for each in ("eta", "multiple", "step_price", "constant")},
        "table": "table=16,64@5000,256@20000",
        "ramp": "ramp=16,256@20000",
    }
)
"""How each kind is written. A table has the first size, then further sizes with the examples from which they apply; a
ramp has its first and last size, with its length in examples."""

ASSUMPTIONS = (
    "The noise scale depends on the progress made, and not on the batch by which it was made.",
    "Each batch has the learning rate that is right for it.",
    "The averaged noise scale of the journal is used as it is; if it is missing at a step, the one before is used.",
    "A choice is followed at once and without rounding, within the limits: no hold, no pace, no error bar.",
    "A step makes 1 / (1 + B / b) of the progress of one without noise (McCandlish et al. 2018, section 2).",
)


class Choice(NamedTuple):
    """A choice of batch sizes.

    Args:
        kind: "eta" for ``NormTest(eta)``, "multiple" for ``NoiseScale(multiple)``, "step_price" for
            ``StepPrice(examples)``, "constant" for one batch size, "table" and "ramp" for a schedule on examples.
        value: the number; for a schedule its first size.
        schedule: the schedule of a table or a ramp; None for the others.
    """

    kind: ChoiceKind
    value: float
    schedule: Stages | LinearRamp | None = None

    @property
    def name(self) -> str:
        """The choice in words."""
        if isinstance(self.schedule, Stages):
            later = (f", {each.global_batch_size:,} from {each.after.count:,.0f}" for each in self.schedule.then)
            return f"table {self.schedule.first:,}{''.join(later)}"
        if self.schedule is not None:
            return f"ramp {self.schedule.first:,} to {self.schedule.last:,} over {self.schedule.over.count:,.0f}"
        return NAMES[self.kind].format(f"{self.value:,.0f}" if self.value >= 100 else f"{self.value:.3g}")

    @classmethod
    def parse(cls, text: str) -> Choice:
        """A choice from a text such as ``eta=0.7``, ``constant=256`` or ``table=16,64@5000``.

        Raises:
            ValueError: if the kind is unknown, or a value is outside its range.
        """
        kind, equals, value = text.partition("=")
        if not equals or kind not in get_args(ChoiceKind):
            raise ValueError(f"a choice is one of {', '.join(USAGE.values())}, got {text!r}")
        if kind in ("table", "ramp"):
            schedule = _schedule(kind, value)
            return cls(kind, float(schedule.first), schedule)  # type: ignore[arg-type]  # looked up above
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{kind} takes a number, got {value!r}") from None
        checked = cls(kind, number)  # type: ignore[arg-type]  # looked up above
        # raises for a value outside its range, here rather than in the middle of a report
        checked.criterion()
        return checked

    def criterion(self) -> Criterion | None:
        """The criterion of the choice; None for a constant batch or a schedule.

        Raises:
            ValueError: if a value is outside its range.
        """
        if self.schedule is not None:
            return None
        if self.kind == "constant":
            if not 1 <= self.value < math.inf:
                raise ValueError(f"a constant batch must be at least 1 example, got {self.value:g}")
            return None
        if self.kind == "eta":
            if not 0 < self.value < 1:
                raise ValueError(f"eta must lie between 0 and 1, where a norm test comes to rest, got {self.value:g}")
            return NormTest(self.value)
        return NoiseScale(self.value) if self.kind == "multiple" else StepPrice(self.value)


def _schedule(kind: str, text: str) -> Stages | LinearRamp:
    first, *rest = text.split(",")
    try:
        size = int(first)
        # by way of a float, because people write 5e3
        later = [(int(each), int(float(at))) for each, at in (part.split("@") for part in rest)]
    except ValueError:
        raise ValueError(f"a {kind} is written as {USAGE[kind]}, got {text!r}") from None
    if not later or (kind == "ramp" and len(later) > 1):
        raise ValueError(f"a {kind} is written as {USAGE[kind]}, got {text!r}")
    if kind == "ramp":
        return LinearRamp(size, later[0][0], Duration(later[0][1], "examples"))
    return Stages(size, [Stage(Duration(at, "examples"), each) for each, at in later])


class Outcome(NamedTuple):
    """What a choice would have cost.

    Args:
        name: the choice in words.
        mean_batch: examples per step, to the same progress.
        steps_at_equal_examples: steps for as many examples as the run consumed.
        steps: steps to the same progress.
        examples: examples to the same progress.
        efficiency: worth of its examples relative to examples in small batches.
        cost: ``examples + price x steps``, in examples; NaN without a price.
    """

    name: str
    mean_batch: float
    steps_at_equal_examples: float
    steps: float
    examples: float
    efficiency: float
    cost: float


class Segments(NamedTuple):
    """A run in segments of one or several steps each; all arrays have shape (num_segments,).

    Args:
        examples: examples consumed in the segment.
        steps: steps in it.
        progress: progress made in it, in examples of small batches.
        noise_scale: noise scale, in examples, positive and finite. For several steps it is the harmonic mean by
            progress, with which the outcome of a constant batch, or of a multiple of the noise scale, stays the same.
    """

    examples: Floats
    steps: Floats
    progress: Floats
    noise_scale: Floats


def usable_scale(run: RunSteps) -> Floats:
    """The noise scale at each step, where unusable values are replaced by the last usable one (or else the first).

    Raises:
        ValueError: if the journal has no noise scale that is positive and finite.
    """
    usable = np.where(run.noise_scale > 0, run.noise_scale, math.nan)
    if not np.isfinite(usable).any():
        raise ValueError(
            f"{run.name} has no noise scale, without which the cost of another batch cannot be estimated: measure it "
            f"with Measure(monitor=True), or --measure.monitor=true"
        )
    return filled(usable)


def segments(run: RunSteps, *, at_most: int | None = None) -> Segments:
    """The run step by step, or combined into ``at_most`` segments of about equally many examples.

    Raises:
        ValueError: for the same reasons as ``usable_scale``.
    """
    scale = usable_scale(run)
    # An update that was left out consumed its examples but made no progress.
    progress = np.where(run.applied, run.batch / (1 + run.batch / scale), 0.0)
    if at_most is None or run.num_steps <= at_most:
        return Segments(run.batch, np.ones(run.num_steps), progress, scale)
    consumed = np.cumsum(run.batch) - run.batch
    bins = np.minimum((consumed / run.num_examples * at_most).astype(int), at_most - 1)
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    made, over = np.add.reduceat(progress, first), np.add.reduceat(progress / scale, first)
    with np.errstate(divide="ignore", invalid="ignore"):
        # harmonic, so that progress / noise_scale, which counts steps, is the same for the segment as for its steps
        mean = np.where(over > 0, made / over, scale[first])
    return Segments(np.add.reduceat(run.batch, first), np.diff(first, append=run.num_steps) * 1.0, made, mean)


def recorded(run: RunSteps, *, price: float = 0.0) -> Outcome:
    """The outcome of the run itself.

    Raises:
        ValueError: for the same reasons as ``usable_scale``.
    """
    pieces = segments(run)
    examples, steps = float(pieces.examples.sum()), float(pieces.steps.sum())
    return _outcome("as it ran", examples, steps, steps, float(pieces.progress.sum()), price)


def what_if(
    run: RunSteps, choice: Choice, *, limits: tuple[float | None, float | None] = (None, None), price: float = 0.0
) -> Outcome:
    """What another choice of batch sizes would have cost.

    Args:
        run: the run.
        choice: another criterion, a constant batch or a schedule.
        limits: smallest and largest batch for a criterion, in examples; None for no limit. They do not apply to
            constant batches and schedules.
        price: the price of a step, in examples.

    Raises:
        ValueError: if the journal has no noise scale, or a choice is outside its range.
    """
    pieces = segments(run)
    if choice.schedule is not None:
        return _scheduled(choice.name, pieces, choice.schedule, price)
    batch = batches(choice, pieces.noise_scale, limits)
    steps = float((pieces.progress / batch + pieces.progress / pieces.noise_scale).sum())
    examples = float((pieces.progress * (1 + batch / pieces.noise_scale)).sum())
    at_equal = float((pieces.examples / batch).sum())
    return _outcome(choice.name, examples, steps, at_equal, float(pieces.progress.sum()), price)


def _scheduled(name: str, pieces: Segments, schedule: Schedule, price: float) -> Outcome:
    # One segment after the other, because a schedule reads the examples that it has consumed itself.
    steps, examples, begun, at_equal = 0.0, 0.0, 0.0, 0.0
    for consumed, progress, scale in zip(pieces.examples, pieces.progress, pieces.noise_scale, strict=True):
        batch = max(1.0, schedule.size(Progress(examples=int(examples))))
        steps += progress / batch + progress / scale
        examples += progress * (1 + batch / scale)
        at_equal += consumed / max(1.0, schedule.size(Progress(examples=int(begun))))
        begun += consumed
    return _outcome(name, examples, steps, at_equal, float(pieces.progress.sum()), price)


def batches(choice: Choice, noise_scale: Floats, limits: tuple[float | None, float | None]) -> Floats:
    """The batch of a choice at each noise scale, in examples, same shape; not for schedules, which read examples.

    Raises:
        ValueError: if a choice is outside its range.
    """
    criterion = choice.criterion()
    if criterion is None:
        return np.full(len(noise_scale), choice.value)
    asks = resting_size(criterion)
    # Moments of batches of one and two examples for a signal of 1: these criteria depend only on noise over signal.
    wanted = [
        asks(Observation(GradientMoments(1 + scale, 1.0, 1 + scale / 2, 2.0, 2), Progress()))
        for scale in noise_scale.tolist()
    ]
    low, high = limits
    taken: Floats = np.clip(np.array(wanted), max(1.0, low or 1.0), math.inf if high is None else high)
    return taken


def constant_at_equal_examples(run: RunSteps) -> Choice | None:
    """The constant batch that would have made the same progress with as many examples; None if there is none.

    It shows what following the noise was worth: whether the run took fewer steps than this batch.

    Raises:
        ValueError: for the same reasons as ``usable_scale``.
    """
    pieces = segments(run)
    # a constant batch c takes progress x (1 + c / B) examples; this solves for c
    lost = float(pieces.examples.sum() - pieces.progress.sum())
    over = float((pieces.progress / pieces.noise_scale).sum())
    size = lost / over if over > 0 else 0.0
    return Choice("constant", size) if size >= 1 else None


def _outcome(name: str, examples: float, steps: float, at_equal: float, progress: float, price: float) -> Outcome:
    return Outcome(
        name=name,
        mean_batch=examples / steps if steps else math.nan,
        steps_at_equal_examples=at_equal,
        steps=steps,
        examples=examples,
        efficiency=progress / examples if examples else math.nan,
        cost=examples + price * steps if price else math.nan,
    )
