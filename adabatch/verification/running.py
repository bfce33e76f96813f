"""Runs of a training for the checks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.options import EngineOptions, Guard, Measure
from adabatch.adaptive.step import Step
from adabatch.arguments import require_type
from adabatch.batch.control import Limits
from adabatch.batch.plan import steps
from adabatch.batch.schedules import Schedule
from adabatch.runtime.collectives import Collectives, collectives_of
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.engines.copies import fingerprint
from adabatch.runtime.random_state import random_state, set_random_state
from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.verification.training import Make, Training

ACCUMULATION = 4
"""Micro-batches per rank in the largest step of any check."""

OVERFLOWING_STEP = 2
"""The step of a run with a scaler whose loss is made infinite, because overflow by itself depends on the scale."""


class Part(NamedTuple):
    """A micro-batch of this rank, as it was run.

    Args:
        batch: from the loader.
        size: its number of examples.
        weight: its weight in the gradient.
        random: state of the random numbers at the beginning of its forward.
        overflows: whether its loss is made infinite.
    """

    batch: Any
    size: int
    weight: float
    random: Tensor
    overflows: bool

    def rewind(self, training: Training) -> None:
        """Draws the random numbers of its forward again from now on, such as those of dropout."""
        set_random_state(self.random, training.device)

    def loss(self, training: Training) -> Tensor:
        """Its mean loss, not scaled, shape ()."""
        loss = training.loss(training.model, self.batch)
        # a factor, so that the gradient is not finite either, as after a real overflow
        return loss * math.inf if self.overflows else loss


def begin_training(make: Make) -> tuple[Training, Collectives]:
    """A new training and its ranks."""
    training = make()
    require_type(isinstance(training, Training), "make must return an adabatch.verification.Training", training)
    return training, collectives_of(training.model)


def again(make: Make, first: Training, start: int, ranks: Collectives) -> Training:
    """A copy of a training at its beginning, whose weights have the digest ``start``."""
    training = make()
    fresh = training.model is not first.model and training.optimizer is not first.optimizer
    fresh &= training.scaler is None or training.scaler is not first.scaler
    if ranks.minimum_of(fresh, fingerprint(training.model.parameters()) == start) != [1.0, 1.0]:
        raise ValueError(
            "make() must build another model, optimizer and scaler each time, and the same weights: seed torch in it, "
            "before the model is built"
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
    """A run of the training with the batch sizes of the check."""
    return AdaptiveBatch(
        training.model,
        training.optimizer,
        policy,
        micro_batch_size=training.micro_batch_size,
        limits=Limits(min=min(policy.fixed_sizes), max=max(policy.fixed_sizes)),
        probe=training.probe if probed else None,
        measure=Measure(monitor=probed),
        engine=EngineOptions(scaler=training.scaler),
        guard=Guard(check_every=None),  # a check tests whether ranks drift
    )


def steps_of(training: Training, batches: AdaptiveBatch, until: int) -> Iterator[tuple[Step, list[Part]]]:
    """The steps of a run up to the ``until``-th, each with its parts, before its update."""
    last = batches.collectives.rank == batches.collectives.size - 1
    for step in batches.steps(training.loader, until=steps(until), count=training.count, weigh=training.weigh):
        overflows = training.scales and last and batches.consumed.steps == OVERFLOWING_STEP - 1
        parts: list[Part] = []
        for batch in step:
            size = training.count(batch)
            weight = size if training.weigh is None else float(training.weigh(batch))
            # before the forward, which draws the numbers of dropout
            parts.append(Part(batch, size, weight, random_state(training.device), overflows and not parts))
            step.backward(parts[-1].loss(training))
        yield step, parts


def update(training: Training) -> bool:
    """An update as in a hand-written loop; returns whether a scaler left it out."""
    scaler = training.scaler
    if scaler is None:
        training.optimizer.step()
        training.optimizer.zero_grad()
        return False
    scale = scaler.get_scale()
    scaler.step(training.optimizer)
    scaler.update()
    training.optimizer.zero_grad()
    # GradScaler does not say whether it left a step out, but it lowers its scale exactly then
    return scaler.get_scale() < scale


def backward(training: Training, loss: Tensor) -> None:
    """A backward as in a hand-written loop, from a loss that is not scaled yet."""
    scaled = loss if training.scaler is None else training.scaler.scale(loss)
    scaled.backward()  # type: ignore[no-untyped-call]


def check_updated(training: Training, batches: AdaptiveBatch) -> None:
    """Raises a ``ValueError`` if a scaler left out every update, so that there is nothing to compare."""
    if training.scales and batches.progress.steps == 0:
        raise nothing_fits(batches.consumed.steps)


def nothing_fits(num_steps: int) -> ValueError:
    """The error for gradients that are too large for float16 in every step."""
    return ValueError(
        f"the gradients of {num_steps} steps overflowed, so there is nothing to compare: start the GradScaler at a "
        f"smaller init_scale"
    )


def and_left_out(left_out: int) -> str:
    """The part of an explanation about updates that were left out."""
    return f", {left_out} of them left out for overflow," if left_out else ""


def unreduced(model: nn.Module) -> Any:
    """A context in which DDP reduces nothing."""
    inner = uncompiled(model)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()
