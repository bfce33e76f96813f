"""Whether a larger micro-batch fits into memory: all ranks try it before they use it in a step.

If an allocation fails inside a training loop, the step is half done on one rank while the others wait for its
gradients. So before the first step with a new size, each rank runs one micro-batch of that size without a reduction,
and the ranks tell each other how it went. Gradients, buffers and random numbers are then restored, and the step runs
the same micro-batch again.
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
from adabatch.runtime.observers.protocol import Moment, Phase, StepObserver
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.random_state import random_state, set_random_state

_log = logging.getLogger("adabatch")

TrialLoss = Callable[[Any], Tensor]
"""micro-batch -> its mean loss, shape (), as the training loop computes it."""

_FITS, _TOO_LARGE, _RAISED = 0, 1, 2

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
"""Words in the plain ``RuntimeError`` of torch, the CPU's allocator, cuBLAS and cuDNN."""


class TriedRun(Protocol):
    """The run whose micro-batches are tried."""

    @property
    def consumed(self) -> Progress:
        """What all steps consumed so far."""
        ...

    def restrict(self, micro_sizes: tuple[int, ...]) -> BatchPlan:
        """Lets plans use only these micro-batch sizes from now on; returns the next plan."""
        ...


class Trials:
    """The micro-batch sizes that were tried so far, and whether they fitted; equal on all ranks.

    Args:
        loss_of: the loss of a micro-batch; None for no trials.
        engine: of the model.
        probe: needs memory too; None if there is no probe.
        sizes: micro-batch sizes that a plan may use, ascending. The smallest is never tried.

    Raises:
        ValueError: if the forward of the model waits for other ranks, so that one rank cannot fail alone, or if there
            is a single size.
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
        self._found: list[int] = []  # sizes found too large since the last line of the journal

    @property
    def too_large(self) -> int | None:
        """The smallest micro-batch size that ran out of memory; None if none did."""
        return self._too_large

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that may still be used, ascending."""
        limit = self._too_large
        return tuple(size for size in self._declared if limit is None or size < limit)

    def is_due(self, plan: BatchPlan) -> bool:
        """Whether the micro-batch of a plan is larger than any that has run."""
        return self._loss_of is not None and plan.micro_batch_size > self._fits

    def over(self, feed: Feed, run: TriedRun, observers: StepObserver) -> Feed:
        """The feed, with portions whose micro-batch fits into the memory of every rank."""
        return feed if self._loss_of is None else _TriedFeed(feed, self, run, observers)

    def run(self, plan: BatchPlan, portion: Portion) -> tuple[Portion, bool]:
        """Runs the first micro-batch of a step on all ranks, without an update.

        Args:
            plan: of the step.
            portion: of the step; it is used up.

        Returns:
            A portion of the same micro-batches, and whether it fitted into the memory of every rank.

        Raises:
            RuntimeError: if the trial failed on another rank, other than for lack of memory.
            Exception: the error of this rank, other than for lack of memory.
        """
        # The micro-batch of the trial is put back in front, so that the step consumes exactly the same data.
        rest = iter(portion.batches)
        first = next(rest)
        outcome, error = self._outcome(first, plan)
        # The worst outcome of all ranks. It is also how they agree: all go on with the same plan, or all raise.
        (worst,) = self._engine.collectives.minimum_of(-outcome)
        if error is not None:
            raise error
        size = plan.micro_batch_size
        if worst == -_RAISED:
            raise RuntimeError(
                f"the trial of a micro-batch of {size} examples failed on another rank: its own error says why"
            )
        if worst == -_TOO_LARGE:
            self._too_large = size
            self._found.append(size)
            # one message per run, and not one per rank
            if self._engine.collectives.rank == 0:
                _log.warning(
                    "a micro-batch of %d examples ran out of memory: micro-batches stay at %d examples at most, and "
                    "steps accumulate",
                    size,
                    self.sizes[-1],
                )
        else:
            self._fits = size
        return replace(portion, batches=itertools.chain([first], rest)), worst == _FITS

    def _outcome(self, batch: Any, plan: BatchPlan) -> tuple[int, Exception | None]:
        """The outcome of the trial on this rank. It raises no error, because the other ranks wait for the outcome."""
        found: tuple[int, Exception | None] = (_FITS, None)
        try:
            with self._with_state_restored():
                self._run(batch, plan)
        except Exception as error:
            # an error about memory is dropped here, so that the tensors in its traceback are freed
            found = (_TOO_LARGE, None) if is_out_of_memory(error) else (_RAISED, error)
        if found[0] == _TOO_LARGE:
            # Cycles through the error's traceback may still hold the activations; freed memory goes back to the device,
            # because the smaller micro-batch needs blocks of other sizes.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

    def _run(self, batch: Any, plan: BatchPlan) -> None:
        """One micro-batch, or two if steps accumulate: the second one runs beside the gradient of the first."""
        assert self._loss_of is not None
        if self._probe is not None:
            self._probe.start(self._engine.collectives.size)
        # not more: from the second on, every micro-batch needs the same memory
        for _ in range(min(2, plan.accumulation_steps)):
            share = self._loss_of(batch) / plan.accumulation_steps
            if self._probe is not None:
                self._probe.begin_part()
            self._engine.backward.run(share)
            if self._probe is not None:
                self._probe.end_part(plan.micro_batch_size, 1 / plan.accumulation_steps)

    @contextmanager
    def _with_state_restored(self) -> Iterator[None]:
        """Restores gradients, buffers and random numbers; nothing is communicated."""
        inner = self._engine.inner_model()
        device = next(inner.parameters()).device
        grads = [(p, p.grad) for p in inner.parameters()]
        # such as the running means of batch norm, which a forward changes
        buffers = [(buffer, buffer.clone()) for buffer in inner.buffers()]
        numbers = random_state(device)
        for p, _ in grads:
            p.grad = None  # put aside, not cleared: the tensors themselves come back
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
            set_random_state(numbers, device)

    # --- journal and state ------------------------------------------------------------------------------------------

    def journal_entry(self) -> dict[str, Any]:
        """What the journal line of the step after the trials says about them."""
        found, self._found = self._found, []
        return {"out_of_memory": found} if found else {}

    def state_dict(self) -> dict[str, Any] | None:
        """The results of the trials: plain numbers, equal on all ranks; None if there are no trials."""
        if self._loss_of is None:
            return None
        return {"sizes": list(self._declared), "fits": self._fits, "too_large": self._too_large}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes over the results of a run with the same sizes. With other sizes, or None, everything is tried again."""
        if state is None or self._loss_of is None or tuple(state["sizes"]) != self._declared:
            state = {"fits": self._declared[0], "too_large": None}
        self._fits, self._too_large = state["fits"], state["too_large"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def _check_can_try(engine: Engine, sizes: Sequence[int]) -> None:
    if not engine.runs_alone:
        raise ValueError(
            f"trial= lets each rank run a micro-batch by itself, but in the forward of this "
            f"{type(engine.model).__name__} the ranks gather shards from each other, so that one that runs out of "
            f"memory would leave the others waiting: leave trial= out, and give a max_micro_batch_size that is known "
            f"to fit"
        )
    if len(sizes) == 1:
        raise ValueError(
            f"trial= tries larger micro-batches, but this run has micro-batches of {sizes[0]} only: give a "
            f"max_micro_batch_size above {sizes[0]}, or leave trial= out"
        )


class _TriedFeed:
    """Portions whose micro-batch fits into the memory of every rank."""

    def __init__(self, feed: Feed, trials: Trials, run: TriedRun, observers: StepObserver) -> None:
        self._feed = feed
        self._trials = trials
        self._run = run
        self._observers = observers

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step, whose plan the trial may change."""
        portion = self._feed.take(plan)
        # a loop, because the smaller size that takes its place may not have run either
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
