"""The critical batch, measured: branches of one run at several batch sizes, compared after equal examples.

The noise scale predicts up to which size a larger batch costs nothing. This module measures it: from one state,
branches train on equal numbers of examples, each at a different batch size. The critical batch is the largest one whose
loss equals that of the smallest, within a tolerance.

Source: Merrill, Arora, Groeneveld, Hajishirzi 2025, "Critical Batch Size Revisited" (arXiv:2505.23971).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adabatch.arguments import checked, require

TOLERANCE = 0.005
"""Of the loss of the smallest batch."""


class CriticalBatch(NamedTuple):
    """The result of a measurement.

    Args:
        size: the largest global batch size whose loss, and that of all smaller sizes, is within the tolerance.
        crossing: the batch size at which the loss leaves the tolerance, interpolated linearly in its logarithm between
            ``size`` and the next size that was tried. Infinite if no size left it.
        losses: the smoothed loss of each batch size, in ascending order of the sizes.
        bound: the largest loss within the tolerance.
    """

    size: int
    crossing: float
    losses: Mapping[int, float]
    bound: float

    @property
    def is_bound(self) -> bool:
        """Whether every size was within the tolerance, so that the critical batch is at least ``size``."""
        return math.isinf(self.crossing)

    def ratio(self, noise_scale: float) -> float:
        """The critical batch over a noise scale in examples; NaN if the noise scale is not positive and finite."""
        return self.size / noise_scale if 0 < noise_scale < math.inf else math.nan


@checked
def smoothed_losses(losses: ArrayLike, batch_sizes: ArrayLike, *, half_life: float) -> NDArray[np.float64]:
    """The exponential average of a loss over examples, after each step.

    The weight of an example halves every ``half_life`` examples, at any batch size, so that branches average over the
    same data. The average has no bias at the beginning: the weights always add up to 1.

    Args:
        losses: mean loss of each step, shape (num_steps,).
        batch_sizes: examples of each step, shape (num_steps,).
        half_life: in examples.

    Returns:
        Shape (num_steps,).

    Raises:
        ValueError: if shapes differ, or batches or the half-life are not positive.
    """
    values, sizes = np.asarray(losses, dtype=np.float64), np.asarray(batch_sizes, dtype=np.float64)
    if values.shape != sizes.shape or values.ndim != 1:
        raise ValueError(
            f"need a loss and a batch size for each step (losses and batch_sizes), got shapes {values.shape} and "
            f"{sizes.shape}"
        )
    require(bool((sizes > 0).all()), "batch_sizes: batch sizes must be positive", sizes.min())
    require(0 < half_life < math.inf, "half_life must be a positive number of examples", half_life)
    averages = np.empty_like(values)
    total = weight = 0.0
    # The numerator and the sum of the weights apart, divided at each step: no bias towards the zero at the start.
    for step, (value, kept) in enumerate(zip(values, np.exp2(-sizes / half_life), strict=True)):
        total, weight = kept * total + (1 - kept) * value, kept * weight + (1 - kept)
        averages[step] = total / weight
    return averages


@checked
def critical_batch(losses: Mapping[int, float], *, tolerance: float = TOLERANCE) -> CriticalBatch:
    """The critical batch of branches that trained on equally many examples.

        largest b with loss(b') <= loss(b_min) + tolerance |loss(b_min)| for all b' <= b

    A size above the first one that fails does not count, even if it passes, because that is chance.

    Args:
        losses: by global batch size, the loss at the end of its branch; not finite if the branch diverged.
        tolerance: a share of the loss of the smallest batch.

    Raises:
        ValueError: if there are fewer than two sizes, a size or the tolerance is not positive, or the smallest batch
            diverged.

    Source: Merrill et al. 2025, where the tolerance is 0.01 and the comparison is with the best of the
    smaller sizes. Here it is with the smallest, so that a learning rate that suits a middle size better than the
    smallest does not hide it.
    """
    known = dict(sorted(losses.items()))
    require(len(known) >= 2, "losses: a critical batch needs branches at no fewer than two batch sizes", list(known))
    sizes = list(known)
    require(sizes[0] >= 1, "batch sizes must be at least 1 example", sizes[0])
    require(0 < tolerance < math.inf, f"tolerance must be a positive share of the loss, such as {TOLERANCE}", tolerance)
    first = known[sizes[0]]
    if not math.isfinite(first):
        raise ValueError(f"the branch at the smallest batch, {sizes[0]}, diverged: lower its learning rate")
    # abs, because a loss may be negative (a log-likelihood of densities)
    bound = first + tolerance * abs(first)
    size = sizes[0]
    for larger in sizes[1:]:
        if not known[larger] <= bound:  # also NaN
            return CriticalBatch(size, _crossing(size, larger, known, bound), known, bound)
        size = larger
    return CriticalBatch(size, math.inf, known, bound)


def _crossing(size: int, larger: int, losses: Mapping[int, float], bound: float) -> float:
    below, above = losses[size], losses[larger]
    # a branch that diverged leaves nothing to interpolate to
    if not math.isfinite(above):
        return float(size)
    return size * math.exp(math.log(larger / size) * (bound - below) / (above - below))


@checked
def measure_critical_batch(
    branch: Callable[[int], Iterable[tuple[int, float]]],
    sizes: Sequence[int],
    *,
    half_life: float,
    tolerance: float = TOLERANCE,
) -> CriticalBatch:
    """Runs a branch for each batch size, one after the other, and compares their smoothed losses.

    Args:
        branch: global batch size -> examples and mean loss of each step of a branch at that size. Each branch begins
            from the same state, has a learning rate that suits its size, and consumes the same number of examples.
        sizes: global batch sizes, at least two.
        half_life: of the smoothing, in examples.
        tolerance: a share of the loss of the smallest batch.

    Raises:
        ValueError: as for ``critical_batch``; also if a branch has no step, or if the examples of branches differ by
            more than the largest batch, so that their losses cannot be compared.
    """
    require(len(sizes) > 0 and min(sizes) >= 1, "sizes must be batch sizes of at least 1 example", list(sizes))
    ends: dict[int, float] = {}
    counts: dict[int, int] = {}
    for size in sorted(set(sizes)):
        steps = list(branch(size))
        if not steps:
            raise ValueError(f"the branch at batch size {size} ran no step")
        batches, losses = zip(*steps, strict=True)
        counts[size] = sum(batches)
        ends[size] = float(smoothed_losses(losses, batches, half_life=half_life)[-1])
    # max(counts) is the largest batch size: a branch ends with a whole batch, and may overshoot by almost one
    if max(counts.values()) - min(counts.values()) > max(counts):
        raise ValueError(f"branches must consume equally many examples, got {counts}")
    return critical_batch(ends, tolerance=tolerance)
