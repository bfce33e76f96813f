"""Whether the ranks stay together while the batch changes."""

from __future__ import annotations

from collections.abc import Sequence

from adabatch.arguments import checked
from adabatch.batch.plan import steps
from adabatch.batch.schedules import Stage, Stages
from adabatch.runtime.engines.copies import odd_ranks
from adabatch.runtime.wrappers.fsdp2 import is_sharded
from adabatch.verification.running import (
    ACCUMULATION,
    adaptive,
    and_left_out,
    begin_training,
    check_updated,
    size_of,
    steps_of,
    update,
)
from adabatch.verification.training import Check, Make

STEPS_BEFORE_CHANGE = 3
STEPS_AFTER_CHANGE = 4


@checked
def drift(make: Make) -> Check:
    """Whether all ranks hold the same parameters, to the bit, after the accumulation went from 1 to 4 at step 4.

    It measures the number of ranks that differ from the others, and also checks that every rank made the planned steps.
    Sharded parameters exist only once, so for those only the steps are compared. With a scaler, step 2 is made to
    overflow on the last rank, and all ranks must leave it out, like the steps that overflow because the first scale is
    too large.

    Raises:
        ValueError: if the data set is smaller than the largest step, the loader's pass ends within the check, or every
            step overflows.
    """
    training, ranks = begin_training(make)
    small, large = size_of(training, ranks, 1), size_of(training, ranks, ACCUMULATION)
    schedule = Stages(small, [Stage(steps(STEPS_BEFORE_CHANGE), large)])
    # or a make() that forgets to seed one rank would be reported as drift
    differed_before = odd_ranks(ranks, training.model)
    # A single micro-batch on a single rank has no spread to measure.
    batches = adaptive(training, schedule, probed=ranks.size > 1)
    total = STEPS_BEFORE_CHANGE + STEPS_AFTER_CHANGE
    made: list[int] = []
    left_out = 0
    for step, parts in steps_of(training, batches, total):
        if len(parts) < step.plan.accumulation_steps:
            raise ValueError(
                f"the loader's pass ended in step {len(made) + 1} of {total}, so its size was not the planned one: "
                f"give a loader of at least "
                f"{STEPS_BEFORE_CHANGE + STEPS_AFTER_CHANGE * ACCUMULATION} micro-batches per rank, or a GlobalOrder"
            )
        made.append(len(parts))
        left_out += update(training)
    applied = batches.progress.steps
    batches.remove()
    check_updated(training, batches)
    odd = odd_ranks(ranks, training.model)
    planned = [1] * STEPS_BEFORE_CHANGE + [ACCUMULATION] * STEPS_AFTER_CHANGE
    scaler = None if training.scaler is None else training.scaler.state_dict()
    together = ranks.agree((made, applied, left_out, batches.state_dict(), scaler))
    # of all ranks, because each checks only its own steps
    (as_planned,) = ranks.minimum_of(made == planned and applied == total - left_out)
    measured = float(len(odd))
    skips = and_left_out(left_out)
    if differed_before:
        text = f"{_named(differed_before)} differed from the others before the first step"
    elif odd:
        text = f"{_named(odd)} drifted from the others in {total} steps, over a change from 1 to {ACCUMULATION}"
    elif not together:
        text = "the ranks made different steps, or hold different plans or scales"
    elif not as_planned:
        text = f"micro-batches {made} in {applied} updates, but {planned} in {total - left_out} were planned"
    elif ranks.size == 1:
        text = f"{total} steps{skips} as planned; one rank has none to drift from"
    elif is_sharded(training.model):
        text = f"{total} steps{skips} as planned on {ranks.size} ranks; each holds its own shard of the parameters"
    else:
        steps_made = f"{total} steps{skips or ','} over a change from 1 to {ACCUMULATION}"
        text = f"{ranks.size} ranks equal to the bit after {steps_made}"
    return Check("drift", not odd and not differed_before and together and bool(as_planned), measured, 0.0, text)


def _named(odd: Sequence[int]) -> str:
    return f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
