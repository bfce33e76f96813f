"""Runs of a training, which the checks look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch.adaptive import AdaptiveBatch
from adabatch.batch.control import Limits
from adabatch.batch.plan import steps
from adabatch.batch.schedules import Schedule
from adabatch.runtime.collectives import Collectives, collectives_of
from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.data import GlobalOrder
from adabatch.step import Step
from adabatch.verification.comparing import digest_of
from adabatch.verification.training import Make, Training

ACCUMULATION = 4
"""Micro-batches a rank in the largest step of any check."""


class Randomness(NamedTuple):
    """Where torch's random numbers stand."""

    host: Tensor
    accelerator: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """The present place."""
        cuda = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None, device)

    def restore(self) -> None:
        """Back to this place."""
        torch.set_rng_state(self.host)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


class Part(NamedTuple):
    """A micro-batch of this rank, its examples, its weight, and the random numbers that its forward began with."""

    batch: Any
    size: int
    weight: float
    randomness: Randomness


def begin(make: Make) -> tuple[Training, Collectives]:
    """A training and the ranks it runs on."""
    training = make()
    return training, collectives_of(training.model)


def again(make: Make, first: Training, start: int, ranks: Collectives) -> Training:
    """A copy of a training as it began, with the weights of digest ``start``."""
    training = make()
    anew = training.model is not first.model and training.optimizer is not first.optimizer
    if ranks.minimum_of(anew, digest_of(training.model) == start) != [1.0, 1.0]:
        raise ValueError(
            "make() must build another model and optimizer each time, and the same weights: seed torch in it, before "
            "the model is built"
        )
    return training


def size_of(training: Training, ranks: Collectives, accumulation: int) -> int:
    """The global batch size of ``accumulation`` micro-batches on each rank."""
    size = training.micro_batch_size * accumulation * ranks.size
    largest = training.micro_batch_size * ACCUMULATION * ranks.size
    if isinstance(training.loader, GlobalOrder) and len(training.loader) < largest:
        raise ValueError(
            f"the checks need steps of {largest} examples ({ranks.size} rank(s) x {ACCUMULATION} micro-batches of "
            f"{training.micro_batch_size}), but the data set has {len(training.loader)}: use more data, or a smaller "
            f"micro_batch_size"
        )
    return size


def adaptive(training: Training, policy: Schedule, *, probed: bool) -> AdaptiveBatch:
    """A run of the training with batch sizes of the check's own."""
    return AdaptiveBatch(
        training.model,
        training.optimizer,
        policy,
        micro_batch_size=training.micro_batch_size,
        limits=Limits(min=min(policy.fixed_sizes), max=max(policy.fixed_sizes)),
        monitor=probed,
        probe=training.probe if probed else None,
    )


def steps_of(training: Training, batches: AdaptiveBatch, until: int) -> Iterator[tuple[Step, list[Part]]]:
    """The steps of a run up to the ``until``-th, each with its parts, before its update."""
    device = next(training.model.parameters()).device
    for step in batches.steps(training.loader, until=steps(until), count=training.count, weigh=training.weigh):
        parts = []
        for batch in step:
            size = training.count(batch)
            weight = size if training.weigh is None else float(training.weigh(batch))
            parts.append(Part(batch, size, weight, Randomness.now(device)))
            step.backward(training.loss(training.model, batch))
        yield step, parts


def update(training: Training) -> None:
    """As a person writes it."""
    training.optimizer.step()
    training.optimizer.zero_grad()


def unreduced(model: nn.Module) -> Any:
    """A context in which DDP reduces nothing."""
    inner = uncompiled(model)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()
