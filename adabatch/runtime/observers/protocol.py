"""Observers of a step, and riders on its one reduction: the protocols of both, and the phases."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives, Started


class Phase(StrEnum):
    """What a rank is doing, in the words of a watchdog's errors."""

    START = "the time before the first step"
    BEGIN = "the beginning of steps()"
    DRIFT_CHECK = "the check for drift"
    LOADING = "the loading"
    TRIAL = "the trial of a larger micro-batch"
    FORWARD = "the forward"
    BACKWARD = "the backward"
    AFTER_BACKWARD = "what follows the backward"
    MEASURING = "the measuring"
    BETWEEN = "what follows the micro-batches"


class Moment(NamedTuple):
    """Where in a run a phase begins.

    Args:
        step: number of the step, as in the journal.
        plan: of the step.
        micro_batch: number of the micro-batch in it; None if the phase does not belong to a single one.
        num_examples: of the step over all ranks, once its portion is known.
    """

    step: int
    plan: BatchPlan
    micro_batch: int | None = None
    num_examples: int | None = None


class StepObserver(Protocol):
    """Observes steps, in the same way on every rank; subclass it and override the methods that you need."""

    def before(self, step: int) -> None:
        """Step number ``step`` is about to be taken from the data."""
        return

    def at(self, phase: Phase, moment: Moment) -> None:
        """A phase begins."""
        return

    def after(self, step: int) -> None:
        """The update of step number ``step`` is over, whether it was applied or not."""
        return


class Observers(StepObserver):
    """Several observers as one, called in their order.

    Args:
        observers: the first ones; more can be added until the first step.
    """

    def __init__(self, *observers: StepObserver) -> None:
        self._observers = list(observers)

    def add(self, observer: StepObserver) -> None:
        """Adds an observer."""
        self._observers.append(observer)

    def before(self, step: int) -> None:
        """Tells all."""
        for each in self._observers:
            each.before(step)

    def at(self, phase: Phase, moment: Moment) -> None:
        """Tells all."""
        for each in self._observers:
            each.at(phase, moment)

    def after(self, step: int) -> None:
        """Tells all."""
        for each in self._observers:
            each.after(step)


class Rider(Protocol):
    """Numbers that the ranks sum in a reduction which a step makes anyway: 8 bytes each, and no additional wait."""

    def outgoing(self, device: torch.device) -> Tensor:
        """This rank's numbers, shape (k,), float64, on the device."""
        ...

    def incoming(self, totals: Sequence[float]) -> None:
        """Their sums over the ranks."""
        ...


class RankMean(Rider):
    """The mean over the ranks of one number each.

    Attributes:
        value: the mean, after the reduction.

    Args:
        number: of this rank, shape ().
        size: number of ranks.
    """

    def __init__(self, number: Tensor, size: int) -> None:
        self.value = float("nan")
        self._number = number
        self._size = size

    def outgoing(self, device: torch.device) -> Tensor:
        """This rank's share of the mean."""
        return self._number.to(device, torch.float64).view(1) / self._size

    def incoming(self, totals: Sequence[float]) -> None:
        """The mean."""
        (self.value,) = totals


def summed(collectives: Collectives, numbers: Tensor, riders: Sequence[Rider]) -> list[float]:
    """The sums over the ranks of ``numbers``, shape (k,), float64; the riders receive theirs.

    One reduction and one host sync.
    """
    message = _Message(numbers, riders)
    return message.delivered(collectives.sum(message.values).tolist())  # host sync


def start_summed(collectives: Collectives, numbers: Tensor, riders: Sequence[Rider]) -> SumsUnderWay:
    """Starts what ``summed`` does, without a host sync. Its ``read`` returns the sums, and the riders get theirs."""
    return SumsUnderWay(collectives, _Message(numbers, riders))


class SumsUnderWay:
    """Sums over the ranks that are formed, and copied to the host, while the host and the device go on.

    Args:
        collectives: the ranks, all of which start the same sums.
        message: what is summed.
    """

    def __init__(self, collectives: Collectives, message: _Message) -> None:
        self._message = message
        self._copied: torch.Event | None = None
        self._started = collectives.start_sum(message.values)
        if not message.values.is_cpu:
            # The copy is queued now: it would otherwise wait for all that is queued until it is read.
            host = self._started.wait().to("cpu", non_blocking=True)
            self._copied = torch.Event(message.values.device)
            self._copied.record()
            self._started = Started(host, None)

    @property
    def is_there(self) -> bool:
        """Whether ``read`` would return at once."""
        work = self._started.work
        return (work is None or work.is_completed()) and (self._copied is None or self._copied.query())

    def read(self) -> list[float]:
        """The sums. Waits for this reduction only, not for what was queued on the device after it."""
        if self._copied is not None:
            self._copied.synchronize()  # host sync
        return self._message.delivered(self._started.wait().tolist())


class _Message:
    """All numbers of a step in one tensor: a small reduction costs its latency, not its bytes."""

    def __init__(self, numbers: Tensor, riders: Sequence[Rider]) -> None:
        sent = [rider.outgoing(numbers.device) for rider in riders]
        self.values = torch.cat([numbers, *sent])
        self._riders = riders
        # The sum is cut by this rank's own lengths: all ranks send the same riders in the same order.
        self._lengths = [len(part) for part in sent]
        self._num_own = len(numbers)

    def delivered(self, totals: list[float]) -> list[float]:
        """Gives the riders their sums, and returns the others."""
        end = self._num_own
        for rider, length in zip(self._riders, self._lengths, strict=True):
            rider.incoming(totals[end : end + length])
            end += length
        return totals[: self._num_own]
