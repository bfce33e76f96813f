"""Observers hear every phase in its order, and riders get their own sums back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.loops import network, regression
from torch import Tensor
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, GlobalOrder, steps
from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.observers.protocol import Moment, Observers, Phase, RankMean, Rider, StepObserver, summed

PLAN = BatchPlan(micro_batch_size=1, accumulation_steps=1, dp_size=1)


class Heard(StepObserver):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def before(self, step: int) -> None:
        self.said.append(("before", step))

    def at(self, phase: Phase, moment: Moment) -> None:
        self.said.append((phase, moment.step, moment.micro_batch))

    def after(self, step: int) -> None:
        self.said.append(("after", step))


class Deaf(StepObserver):
    """Defines nothing."""


def test_an_observer_hears_a_step_in_order() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
    heard = Heard()
    batches._loop.observers.add(heard)
    for step in batches.steps(GlobalOrder(regression(32)), until=steps(2)):
        for x, y in step:
            step.backward((model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert heard.said == [
        told
        for number in (0, 1)
        for told in (
            ("before", number),
            (Phase.LOADING, number, None),
            (Phase.FORWARD, number, 0),
            (Phase.BACKWARD, number, 0),
            (Phase.AFTER_BACKWARD, number, 0),
            (Phase.LOADING, number, 1),
            (Phase.FORWARD, number, 1),
            (Phase.BACKWARD, number, 1),
            (Phase.AFTER_BACKWARD, number, 1),
            (Phase.MEASURING, number, None),
            (Phase.BETWEEN, number, None),
            ("after", number),
        )
    ]


def test_an_observer_defines_what_it_needs() -> None:
    both = Observers(Deaf(), heard := Heard())
    both.before(3)
    both.at(Phase.LOADING, Moment(3, PLAN))
    both.after(3)
    assert heard.said == [("before", 3), (Phase.LOADING, 3, None), ("after", 3)]


class Two(Rider):
    """Sends so many numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers
        self.heard: Sequence[float] = ()

    def outgoing(self, device: torch.device) -> Tensor:
        return torch.tensor(self.numbers, dtype=torch.float64, device=device)

    def incoming(self, totals: Sequence[float]) -> None:
        self.heard = totals


def test_riders_get_their_own_numbers_back() -> None:
    none, two, mean = Two(), Two(3.0, 4.0), RankMean(torch.tensor(5.0), 1)
    own = summed(Collectives(), torch.tensor([1.0, 2.0], dtype=torch.float64), [none, two, mean])
    assert own == [1.0, 2.0]
    assert list(none.heard) == []
    assert list(two.heard) == [3.0, 4.0]
    assert mean.value == 5.0
