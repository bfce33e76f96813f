"""Goodput: the batch size at which this hardware makes the most progress a second."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from adabatch.arguments import require_one_of
from adabatch.batch.criteria import Observation, ratio
from adabatch.batch.efficiency import efficiency
from adabatch.batch.moments import Norm
from adabatch.batch.needs import Needs
from adabatch.batch.plan import PlanGrid
from adabatch.batch.step_times import StepTimeModel

REACH = 4
"""How far beyond the largest batch that was timed the model of step times is believed."""


@dataclass(frozen=True)
class Goodput:
    """The batch with the most progress a second: examples a second times progress an example.

        goodput(b) = b / seconds(b) * (noise_scale + b_ref) / (noise_scale + b)

    ``seconds`` is a model fitted to this run's own steps (`StepTimes`). Where a step costs ``t_0`` and an example
    ``t_1`` more, goodput is largest at ``b = sqrt(noise_scale * t_0 / t_1)``: the geometric mean of the noise scale and
    of the batch whose examples take as long as all else. So the batch grows with the noise only as far as the larger
    one is faster *here*, and hardware that is busy with small batches keeps them. The reference cancels.

    Around that size goodput is flat: a batch twice or half as large loses a ninth at most. The present batch stands
    unless ``min_speedup`` is to be gained.

    A batch stands until a step of it was timed. The first one teaches one number only, so the first growth is a trial:
    a batch that turns out to be no faster is left again (with ``Control(monotone=True)`` it stands, and is the last).

    Where the price of a step is known, ``StepPrice`` asks for the same batch from a given number, and is deterministic.

    Steps are timed from one measured step to the next, evaluation and waiting for data in between included (the median
    of the last few counts). The ranks agree on the mean of their times, one measured step late, in the reduction that
    is made anyway: 8 bytes more, and no wait more. Steps that are not of the plan, and the first after each change, are
    not timed. A plan's time is the median of its last five steps, so a pause moves nothing. The times are saved with
    the run, and a resumed one decides on the same ones until it has measured its own. Times are of one machine: two
    equal runs need not choose equal batches, and their journals differ.

    Args:
        min_speedup: gain of goodput for which the batch changes, as a share, zero or positive.
        norm: in which the noise scale is measured, as in `NoiseScale`.

    Raises:
        ValueError: a gain that is negative or not finite, or an unknown norm.

    Source: Pollux (Qiao et al. 2021), section 3, with the model of step times said at `StepTimeModel`.
    """

    min_speedup: float = field(default=0.05, kw_only=True)
    norm: Norm = field(default="euclidean", kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.min_speedup < math.inf:
            raise ValueError(f"min_speedup must be zero or positive, such as 0.05, got {self.min_speedup}")
        require_one_of("norm", self.norm, Norm)

    @property
    def needs(self) -> Needs:
        """Noise and signal in the norm, and how long steps take."""
        return Needs(noise=self.norm, seconds=True)

    def wanted(self, observation: Observation) -> float:
        """The batch with the most goodput, or the present one where that is hardly slower."""
        moments, times, grid = observation.moments, observation.times, observation.grid
        if moments is None or times is None or grid is None:
            return math.nan
        present, noise_scale = moments.num_examples, ratio(moments.noise, moments.signal)
        if not noise_scale > 0:
            return noise_scale
        if present not in times.sizes:
            return present
        if noise_scale == math.inf:
            return noise_scale
        seconds = _seconds_of(times.model, grid)

        def goodput(size: float) -> float:
            return size / seconds(size) * efficiency(size, noise_scale, reference=1)

        best = max(_candidates(times.model, grid, noise_scale, REACH * max(times.sizes)), key=goodput)
        return present if goodput(best) < (1 + self.min_speedup) * goodput(present) else best


def _seconds_of(model: StepTimeModel, grid: PlanGrid) -> Callable[[float], float]:
    """The time of a step of any size: the micro-batch grows as far as it may, and then their number."""
    smallest, largest = min(grid.micro_sizes), max(grid.micro_sizes)

    def seconds(size: float) -> float:
        share = size / grid.dp_size
        micro = min(max(share / grid.min_accumulation, smallest), largest)
        return model.seconds(micro, share / micro, grid.dp_size)

    return seconds


def _candidates(model: StepTimeModel, grid: PlanGrid, noise_scale: float, reach: float) -> tuple[float, float]:
    """The best size while the micro-batch grows, and the best once their number does; up to ``reach``."""

    def optimum(step: float, example: float) -> float:
        """Where ``b / ((step + example b) (noise_scale + b))`` is largest."""
        return math.sqrt(noise_scale * step / example) if example > 0 else math.inf

    least, dp_size, micro = grid.min_accumulation, grid.dp_size, max(grid.micro_sizes)
    smallest, grown = (size * least * dp_size for size in (min(grid.micro_sizes), micro))
    step = model.step(dp_size)
    while_growing = optimum(step + least * model.micro_batch, model.example / dp_size)
    once_grown = optimum(step, (model.micro_batch / micro + model.example) / dp_size)
    sizes = min(while_growing, grown), max(once_grown, grown)
    return max(smallest, min(sizes[0], reach)), max(smallest, min(sizes[1], reach))
