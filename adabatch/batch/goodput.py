"""Goodput: the batch size with which this hardware makes the most progress per second."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from adabatch.arguments import check_fields, require_one_of
from adabatch.batch.criteria import Observation, ratio
from adabatch.batch.efficiency import efficiency
from adabatch.batch.moments import Norm
from adabatch.batch.needs import Needs
from adabatch.batch.plan import PlanGrid
from adabatch.batch.step_times import StepTimeModel

REACH = 4
"""Factor above the largest timed batch up to which the model of step times is trusted."""


@dataclass(frozen=True)
class Goodput:
    """The batch with the most progress per second: examples per second times progress per example.

        goodput(b) = b / seconds(b) * (noise_scale + b_ref) / (noise_scale + b)

    ``seconds`` is a model fitted to this run's own steps (`StepTimes`). If a step costs ``t_0``, and each example an
    additional ``t_1``, goodput is largest at ``b = sqrt(noise_scale * t_0 / t_1)``: the geometric mean of the noise
    scale and of the batch whose examples take as long as everything else. The batch thus grows with the noise only as
    far as this makes the run faster on *this* hardware. The reference cancels.

    Goodput is flat around that size: a batch twice or half as large loses at most a ninth. The batch is kept unless a
    change would gain ``min_speedup``.

    A batch is kept until one of its steps was timed. The first plan gives a single time, so the first growth is a
    trial: if the larger batch is not faster, it shrinks again (with ``Control(monotone=True)`` it is kept, and never
    grows further).

    If the price of a step is known, ``StepPrice`` asks for the same batch from that number, and is deterministic.

    Steps are timed from one measured step to the next, including the wait for data. The ranks agree on the mean of
    their times, one measured step late, in the reduction that is made anyway: 8 more bytes, and no additional wait.
    Steps that differ from the plan, the first step after each change, and stretches with an evaluation in them
    (``record_evaluation``) are not timed. A plan's time is the median of its last five steps, so that a pause hardly
    changes it. The times are saved with the run, and a resumed run uses them until it has measured its own. Times
    depend on the machine: two equal runs need not choose equal batches, and their journals differ.

    Args:
        min_speedup: relative gain of goodput for which the batch changes, zero or positive.
        norm: in which the noise scale is measured, as in `NoiseScale`.

    Raises:
        ValueError: if the gain is negative or not finite, or the norm is unknown.

    Source: Pollux (Qiao et al. 2021), section 3, with the model of step times in `StepTimeModel`.
    """

    min_speedup: float = field(default=0.05, kw_only=True)
    norm: Norm = field(default="euclidean", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.min_speedup < math.inf:
            raise ValueError(f"min_speedup must be zero or positive, such as 0.05, got {self.min_speedup}")
        require_one_of("norm", self.norm, Norm)

    @property
    def needs(self) -> Needs:
        """Noise and signal in the norm, and how long steps take."""
        return Needs(noise=self.norm, seconds=True)

    def wanted(self, observation: Observation) -> float:
        """The batch with the most goodput, or the present one if that is hardly slower."""
        moments, times, grid = observation.moments, observation.times, observation.grid
        if moments is None or times is None or grid is None:
            return math.nan
        present, noise_scale = moments.num_examples, ratio(moments.noise, moments.signal)
        if not noise_scale > 0:
            return noise_scale
        # Before the next case: even with no signal in sight, a batch is timed once before a larger one is tried.
        if present not in times.sizes:
            return present
        if noise_scale == math.inf:
            return noise_scale
        seconds = _seconds_of(times.model, grid)

        def goodput(size: float) -> float:
            # any reference gives the same order
            return size / seconds(size) * efficiency(size, noise_scale, reference=1)

        best = max(_candidates(times.model, grid, noise_scale, REACH * max(times.sizes)), key=goodput)
        return present if goodput(best) < (1 + self.min_speedup) * goodput(present) else best


def _seconds_of(model: StepTimeModel, grid: PlanGrid) -> Callable[[float], float]:
    """The time of a step of any size: the micro-batch grows up to its limit, and then the number of micro-batches."""
    smallest, largest = min(grid.micro_sizes), max(grid.micro_sizes)

    def seconds(size: float) -> float:
        share = size / grid.dp_size
        micro = min(max(share / grid.min_accumulation, smallest), largest)
        # not rounded to plans that can be run, so that goodput is smooth in the size; the control rounds
        return model.seconds(micro, share / micro, grid.dp_size)

    return seconds


def _candidates(model: StepTimeModel, grid: PlanGrid, noise_scale: float, reach: float) -> tuple[float, float]:
    """The best size while the micro-batch grows, and the best when their number grows; up to ``reach``."""

    def optimum(step: float, example: float) -> float:
        """The b for which ``b / ((step + example b) (noise_scale + b))`` is largest."""
        return math.sqrt(noise_scale * step / example) if example > 0 else math.inf

    # The time of a step has a kink where the micro-batch is full, so goodput has an optimum on either side of it.
    least, dp_size, micro = grid.min_accumulation, grid.dp_size, max(grid.micro_sizes)
    smallest, grown = (size * least * dp_size for size in (min(grid.micro_sizes), micro))
    step = model.step(dp_size)
    while_growing = optimum(step + least * model.micro_batch, model.example / dp_size)
    once_grown = optimum(step, (model.micro_batch / micro + model.example) / dp_size)
    sizes = min(while_growing, grown), max(once_grown, grown)
    return max(smallest, min(sizes[0], reach)), max(smallest, min(sizes[1], reach))
