"""Whether a constant policy leaves a loop unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from adabatch.arguments import MOST_STEPS, checked, whole
from adabatch.batch.schedules import Constant
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.engines.copies import fingerprint
from adabatch.verification.equality import largest_difference, state_of
from adabatch.verification.running import (
    Part,
    adaptive,
    again,
    and_left_out,
    backward,
    begin_training,
    check_updated,
    size_of,
    steps_of,
    unreduced,
    update,
)
from adabatch.verification.training import Check, Make, Training

UNEVEN_ACCUMULATION = 3
"""Micro-batches per rank in tests of exact bits: a third cannot be represented in float32, a quarter can."""


@checked
def constant_policy(make: Make, *, num_steps: int = 20) -> Check:
    """Whether training with ``AdaptiveBatch`` and a constant batch equals a hand-written loop, to the bit.

    It measures the largest difference in weights, buffers or optimizer state on any rank. The loop is plain gradient
    accumulation over the same micro-batches with the same random numbers. The probe is on, which must not change
    anything. With a scaler the loop scales too, and the scales are compared; both must leave out the same updates.

    Raises:
        ValueError: if the data set is smaller than the step, every step overflows, or ``make`` does not give the same
            weights again.
    """
    num_steps = whole("num_steps", num_steps, at_least=1, at_most=MOST_STEPS)
    training, ranks = begin_training(make)
    # before the first step: `again` checks that another training begins with the same bits
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
        # some kernels add in an order that changes from run to run; the check then fails, and says whose fault it is
        if spread:
            text += f"; but two hand-written loops differ by {spread:.2g}: see torch.use_deterministic_algorithms"
    return Check("constant policy", passed, difference, 0.0, text)


def _by_hand(training: Training, seen: Sequence[Sequence[Part]], ranks: Collectives) -> None:
    """Gradient accumulation by hand, without this library."""
    for parts in seen:
        # ranks may hold different numbers of examples in the last step of a pass
        (total,) = ranks.sum_of(sum(part.weight for part in parts))
        for part in parts:
            # dropout must draw the same numbers as in the step
            part.rewind(training)
            with nullcontext() if part is parts[-1] else unreduced(training.model):
                loss = part.loss(training)
                weight = part.weight * ranks.size  # DDP averages over the ranks, while total is a sum
                whole, rest = divmod(total, weight)
                # a division where it is exact, as people write by hand and as `Step.backward` does
                backward(training, loss * (weight / total) if rest else loss / whole)
        update(training)
