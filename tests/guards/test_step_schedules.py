"""A schedule of torch that counts steps, while the batch grows: named, unless it does what it was built for."""

from __future__ import annotations

import warnings
from typing import Any

from support.loops import loss_of, network, regression
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR
from torch.utils.data import DataLoader

from adabatch import AdaptiveBatch, Constant, ProgressLR, Stage, Stages, examples, lr, steps
from adabatch.batch.plan import Duration

GROWS = Stages(8, [Stage(examples(64), 16)])
TOTAL = examples(512)


def warned(
    make: Any, *, criterion: Any = GROWS, until: Duration | None = TOTAL, epochs: int = 1, per_epoch: bool = False
) -> list[str]:
    """The warnings of a run of 512 examples whose batch grows from 8 to 16 after 64."""
    model = network()
    optimizer: Optimizer = SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(model, optimizer, criterion, micro_batch_size=4)
    schedule: LRScheduler = make(optimizer, batches)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(epochs):
            for step in batches.steps(DataLoader(regression(512), batch_size=4), until=until):
                for batch in step:
                    step.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
                if not per_epoch:
                    schedule.step()
            if per_epoch:
                schedule.step()
    return [str(each.message) for each in said]


def cosine(optimizer: Optimizer, batches: AdaptiveBatch) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=64)


def test_a_schedule_that_counts_steps_is_named_once_the_batch_grows() -> None:
    (said,) = warned(cosine)
    assert "a torch scheduler lowers the learning rate of the SGD at each step" in said
    assert "the batch has changed from 8 to 16 examples" in said
    assert "Use adabatch.ProgressLR" in said
    assert warned(cosine, until=None) == [said]


def test_schedules_that_do_what_they_were_built_for_are_not_named() -> None:
    assert warned(cosine, criterion=Constant(8)) == []
    assert warned(cosine, until=steps(30)) == []
    assert warned(lambda optimizer, batches: LambdaLR(optimizer, lambda n: min(1, (n + 1) / 20))) == []
    assert warned(lambda optimizer, batches: StepLR(optimizer, 1), until=None, epochs=5, per_epoch=True) == []
    assert warned(lambda optimizer, batches: ProgressLR(optimizer, lr.cosine(), batches, total=TOTAL)) == []
