"""Whether a larger micro-batch fits into memory: tried on all ranks before a step is made of it.

An allocation that fails inside a training loop leaves a step half done on one rank while the others wait for its
gradients. So the first micro-batch of a size that was never run is run for nothing, without a reduction, before the
step begins; then the ranks tell each other how it went. Nothing is left of a trial but what the allocator keeps:
gradients, buffers and random numbers are as they were, and the step runs the same micro-batch again.
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from adabatch.batch.plan import BatchPlan, Progress
from adabatch.runtime.data import Feed, Portion
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.observers import Moment, Phase, StepObserver
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.random_state import random_state, restore_random_state

_log = logging.getLogger("adabatch")

TrialLoss = Callable[[Any], Tensor]
"""micro-batch -> its mean loss, shape (), as the training loop computes it."""

_FITS, _TOO_LARGE, _RAISED = 0, 1, 2

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
"""What torch, the CPU's allocator, cuBLAS and cuDNN say, where they raise a plain ``RuntimeError``."""


class TriedRun(Protocol):
    """What a trial reads of a run, and tells it."""

    @property
    def consumed(self) -> Progress:
        """What all steps consumed so far."""
        ...

    def restrict(self, micro_sizes: tuple[int, ...]) -> BatchPlan:
        """From now on plans use these micro-batch sizes only; returns the next plan."""
        ...


class Trials:
    """The micro-batch sizes that were tried so far, and how that went; the same on all ranks.

    Args:
        loss_of: the loss of a micro-batch; None tries nothing.
        engine: of the model.
        probe: measures it, and needs memory of its own; None for none.
        sizes: micro-batch sizes that a plan may use, ascending; the smallest is never tried.

    Raises:
        ValueError: a model whose forward waits for other ranks, so that one rank cannot fail by itself; a single size.
    """

    def __init__(self, loss_of: TrialLoss | None, engine: Engine, probe: Probe | None, sizes: Sequence[int]) -> None:
        if loss_of is not None:
            _check_can_try(engine, sizes)
        self._loss_of = loss_of
        self._engine = engine
        self._probe = probe
        self._declared = tuple(sizes)
        self._fits = sizes[0]
        self._too_large: int | None = None
        self._found: list[int] = []  # too large, since the last line of the journal

    @property
    def too_large(self) -> int | None:
        """The smallest micro-batch size that ran out of memory; None where none did."""
        return self._too_large

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those that may still be used, ascending."""
        limit = self._too_large
        return tuple(size for size in self._declared if limit is None or size < limit)

    def is_due(self, plan: BatchPlan) -> bool:
        """Whether the micro-batch of a plan is larger than any that was run."""
        return self._loss_of is not None and plan.micro_batch_size > self._fits

    def over(self, feed: Feed, run: TriedRun, observers: StepObserver) -> Feed:
        """The feed with portions whose micro-batch every rank has the memory for, as far as that is tried."""
        return feed if self._loss_of is None else _TriedFeed(feed, self, run, observers)

    def run(self, plan: BatchPlan, portion: Portion) -> tuple[Portion, bool]:
        """Runs the first micro-batch of a step on all ranks, for nothing.

        Args:
            plan: of the step.
            portion: of the step; used up by this.

        Returns:
            A portion of the same micro-batches, and whether every rank had the memory.

        Raises:
            RuntimeError: the loss or its backward raised something else, on another rank.
            Exception: the same on this rank.
        """
        rest = iter(portion.batches)
        first = next(rest)
        outcome, error = self._outcome(first, plan)
        (worst,) = self._engine.collectives.minimum_of(-outcome)
        if error is not None:
            raise error
        size = plan.micro_batch_size
        if worst == -_RAISED:
            raise RuntimeError(f"the trial of a micro-batch of {size} examples failed on another rank, which says why")
        if worst == -_TOO_LARGE:
            self._too_large = size
            self._found.append(size)
            if self._engine.collectives.rank == 0:
                _log.warning(
                    "a micro-batch of %d examples ran out of memory: micro-batches stay at %d at most, and steps "
                    "accumulate",
                    size,
                    self.sizes[-1],
                )
        else:
            self._fits = size
        return replace(portion, batches=itertools.chain([first], rest)), worst == _FITS

    def _outcome(self, batch: Any, plan: BatchPlan) -> tuple[int, Exception | None]:
        """How it goes on this rank, which raises nothing: the others wait to hear of it.

        An error that has to do with memory is dropped here, and all it holds with it.
        """
        found: tuple[int, Exception | None] = (_FITS, None)
        try:
            with self._without_a_trace():
                self._run(batch, plan)
        except Exception as error:
            found = (_TOO_LARGE, None) if is_out_of_memory(error) else (_RAISED, error)
        if found[0] == _TOO_LARGE:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

    def _run(self, batch: Any, plan: BatchPlan) -> None:
        """One micro-batch, or, where steps accumulate, a second one beside the gradient of the first."""
        assert self._loss_of is not None
        if self._probe is not None:
            self._probe.start(self._engine.collectives.size)
        for _ in range(min(2, plan.accumulation_steps)):
            share = self._loss_of(batch) / plan.accumulation_steps
            if self._probe is not None:
                self._probe.begin_part()
            self._engine.backward.run(share)
            if self._probe is not None:
                self._probe.end_part(plan.micro_batch_size, 1 / plan.accumulation_steps)

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """Puts back gradients, buffers and random numbers; the other ranks learn nothing of it."""
        inner = self._engine.inner_model()
        device = next(inner.parameters()).device
        grads = [(p, p.grad) for p in inner.parameters()]
        buffers = [(buffer, buffer.clone()) for buffer in inner.buffers()]
        numbers = random_state(device)
        for p, _ in grads:
            p.grad = None
        try:
            with self._engine.alone():
                yield
        finally:
            if self._probe is not None:
                self._probe.stop()
            for p, grad in grads:
                p.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            restore_random_state(numbers.unsqueeze(0), 0, device)

    # --- journal and state ------------------------------------------------------------------------------------------

    def journal_entry(self) -> dict[str, Any]:
        """What the line of the step that comes after the trials says of them."""
        found, self._found = self._found, []
        return {"out_of_memory": found} if found else {}

    def state_dict(self) -> dict[str, Any] | None:
        """What was found: plain numbers, equal on all ranks; None where nothing is tried."""
        if self._loss_of is None:
            return None
        return {"sizes": list(self._declared), "fits": self._fits, "too_large": self._too_large}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from what a run found that had the same sizes; with others, or None, everything is tried anew."""
        if state is None or self._loss_of is None or tuple(state["sizes"]) != self._declared:
            state = {"fits": self._declared[0], "too_large": None}
        self._fits, self._too_large = state["fits"], state["too_large"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def _check_can_try(engine: Engine, sizes: Sequence[int]) -> None:
    if not engine.runs_alone:
        raise ValueError(
            f"trial= lets each rank run a micro-batch by itself, and in the forward of this "
            f"{type(engine.model).__name__} the ranks gather shards from each other, so that one without memory "
            f"would leave the others waiting: leave trial= out, and give a max_micro_batch_size that is known to "
            f"fit"
        )
    if len(sizes) == 1:
        raise ValueError(
            f"trial= tries larger micro-batches, and this run has none but {sizes[0]}: give a "
            f"max_micro_batch_size above it, or leave trial= out"
        )


class _TriedFeed:
    """Portions whose micro-batch every rank has the memory for."""

    def __init__(self, feed: Feed, trials: Trials, run: TriedRun, observers: StepObserver) -> None:
        self._feed = feed
        self._trials = trials
        self._run = run
        self._observers = observers

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step, whose plan the trial may change."""
        portion = self._feed.take(plan)
        while portion is not None and self._trials.is_due(plan):
            self._observers.at(Phase.TRIAL, Moment(self._run.consumed.steps, plan))
            portion, fits = self._trials.run(plan, portion)
            if not fits:
                plan = self._run.restrict(self._trials.sizes)
                portion = self._feed.take(plan)
        return portion

    def consumed(self, portion: Portion) -> None:
        """The step has run."""
        self._feed.consumed(portion)
