"""Whether a run can be resumed from a checkpoint without any difference."""

from __future__ import annotations

import io
from typing import Any

import torch

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import checked
from adabatch.batch.plan import steps
from adabatch.batch.schedules import Stage, Stages
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.engines.copies import fingerprint
from adabatch.runtime.random_state import random_state, set_random_state
from adabatch.verification.equality import largest_difference, state_of
from adabatch.verification.running import (
    ACCUMULATION,
    adaptive,
    again,
    begin_training,
    check_updated,
    size_of,
    steps_of,
    update,
)
from adabatch.verification.training import Check, Make, Training

STEPS_BEFORE_SAVE = 3
STEPS_AFTER_SAVE = 3


@checked
def resume(make: Make) -> Check:
    """Whether 3 steps, a checkpoint, and 3 steps of a fresh copy that loaded it equal 6 uninterrupted steps, to the
    bit.

    It measures the largest difference in weights, buffers, the states of optimizer, batch and scaler, or the place in
    the data. The batch grows one step after the checkpoint. The random numbers of torch are restored to those of the
    checkpoint, as your script must do; augmentation in loading processes draws different numbers after a resume.

    Raises:
        ValueError: if the loader is not a ``GlobalOrder``, so that its place in the data cannot be saved, the data set
            is smaller than the largest step, every step overflows, or ``make`` does not give the same weights again.
    """
    whole, ranks = begin_training(make)
    if not isinstance(whole.loader, GlobalOrder):
        raise ValueError(
            f"a resume can be checked with a GlobalOrder only: the place in a {type(whole.loader).__name__} is its own"
        )
    first = 1 if ranks.size > 1 else 2  # at least two parts, so that there is a spread to measure
    small, large = size_of(whole, ranks, first), size_of(whole, ranks, ACCUMULATION)
    schedule = Stages(small, [Stage(steps(STEPS_BEFORE_SAVE + 1), large)])
    total = STEPS_BEFORE_SAVE + STEPS_AFTER_SAVE

    def run_on(training: Training, batches: AdaptiveBatch, until: int) -> None:
        for _ in steps_of(training, batches, until):
            update(training)

    def uninterrupted(training: Training) -> dict[str, Any]:
        batches = adaptive(training, schedule, probed=True)
        run_on(training, batches, total)
        batches.remove()
        check_updated(training, batches)
        return state_of(training, batches)

    start = fingerprint(whole.model.parameters())
    expected = uninterrupted(whole)
    cut = again(make, whole, start, ranks)
    batches = adaptive(cut, schedule, probed=True)
    run_on(cut, batches, STEPS_BEFORE_SAVE)
    random = random_state(cut.device)
    # Through the serialization of a real checkpoint: a state that is merely handed over would share its tensors.
    file = io.BytesIO()
    torch.save(state_of(cut, batches), file)
    batches.remove()

    resumed = again(make, whole, start, ranks)
    batches = adaptive(resumed, schedule, probed=True)
    file.seek(0)
    saved = torch.load(file, map_location=cut.device, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    if resumed.scaler is not None:
        resumed.scaler.load_state_dict(saved["scaler"])
    batches.load_state_dict(saved["batches"])
    assert isinstance(resumed.loader, GlobalOrder)
    resumed.loader.load_state_dict(saved["order"])
    set_random_state(random, cut.device)
    run_on(resumed, batches, total)
    batches.remove()
    difference = largest_difference(state_of(resumed, batches), expected, ranks)
    passed = difference == 0
    text = f"{STEPS_BEFORE_SAVE} steps, a checkpoint and {STEPS_AFTER_SAVE} more equal {total} uninterrupted to the bit"
    if not passed:
        text = f"a resumed run differs from one without a checkpoint by {difference:.2g} after {total} steps"
        # whether the difference is that of the resume, or of kernels that add in another order each time
        spread = largest_difference(uninterrupted(again(make, whole, start, ranks)), expected, ranks)
        if spread:
            text += f"; but two uninterrupted runs differ by {spread:.2g}: see torch.use_deterministic_algorithms"
    return Check("resume", passed, difference, 0.0, text)
