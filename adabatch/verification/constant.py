"""Whether a constant policy changes anything about a loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from adabatch.batch.schedules import Constant
from adabatch.guards.drift import fingerprint
from adabatch.runtime.collectives import Collectives
from adabatch.verification.equality import largest_difference, state_of
from adabatch.verification.running import (
    Part,
    adaptive,
    again,
    and_left_out,
    backward,
    begin,
    check_updated,
    size_of,
    steps_of,
    unreduced,
    update,
)
from adabatch.verification.training import Check, Make, Training

UNEVEN_ACCUMULATION = 3
"""Micro-batches a rank where the bits of the weighting count: a third is not a number of float32, a quarter is."""


def constant_policy(make: Make, *, num_steps: int = 20) -> Check:
    """Whether training around ``AdaptiveBatch`` with a constant batch is a hand-written loop, to the bit.

    It measures the largest difference in weights, buffers or optimizer state on any rank. The loop is plain gradient
    accumulation over the same micro-batches with the same random numbers. The probe is on: it changes nothing either.
    With a scaler the loop scales, and its scale is compared as well; both leave out the same updates.

    Raises:
        ValueError: a data set smaller than the step, a scaler so large that every step overflows, or a ``make`` that
            does not give the same weights again.
    """
    training, ranks = begin(make)
    start = fingerprint(training.model.parameters())
    batches = adaptive(training, Constant(size_of(training, ranks, UNEVEN_ACCUMULATION)), probed=True)
    seen: list[list[Part]] = []
    left_out = 0
    for _, parts in steps_of(training, batches, num_steps):
        seen.append(parts)
        left_out += update(training)
    batches.remove()
    check_updated(training, batches)
    by_hand = again(make, training, start, ranks)
    _by_hand(by_hand, seen, ranks)
    difference = largest_difference(state_of(training), state_of(by_hand), ranks)
    passed = difference == 0
    text = f"{num_steps} steps{and_left_out(left_out)} equal to a hand-written loop to the bit"
    if not passed:
        text = f"{num_steps} steps differ from a hand-written loop by {difference:.2g}"
        once_more = again(make, training, start, ranks)
        _by_hand(once_more, seen, ranks)
        spread = largest_difference(state_of(once_more), state_of(by_hand), ranks)
        if spread:
            text += f"; but two hand-written loops differ by {spread:.2g}: see torch.use_deterministic_algorithms"
    return Check("constant policy", passed, difference, 0.0, text)


def _by_hand(training: Training, seen: Sequence[Sequence[Part]], ranks: Collectives) -> None:
    """Gradient accumulation as a person writes it, without this library."""
    for parts in seen:
        (total,) = ranks.sum_of(sum(part.weight for part in parts))
        for part in parts:
            part.randomness.restore()
            with nullcontext() if part is parts[-1] else unreduced(training.model):
                loss = part.loss(training)
                weight = part.weight * ranks.size  # DDP takes the mean over the ranks, and total is a sum
                whole, rest = divmod(total, weight)
                backward(training, loss * (weight / total) if rest else loss / whole)
        update(training)
