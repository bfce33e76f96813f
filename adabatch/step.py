"""``Step``: one optimizer step of a run, as the training loop sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from adabatch.batch.control import Decision
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan
from adabatch.guards.finite import FindNonfinite
from adabatch.guards.votes import Votes
from adabatch.runtime.data import LossWeights, Portion
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.stopwatch import Stopwatch


class Mark(Protocol):
    """Says where the rank is: what it is doing, and in which micro-batch."""

    def __call__(self, doing: str, *, micro_batch: int | None = None) -> None:
        """From here on."""
        ...


class Step:
    """One optimizer step: iterate over its micro-batches, and call ``backward`` once for each.

    ``AdaptiveBatch.steps`` makes them.

    Attributes:
        plan: micro-batch size, accumulation steps and data-parallel size, fixed before the step began.
        global_batch_size: examples the step takes, over all ranks.
        loss: mean training loss over all ranks, after the inner loop of a probed step; else None.
        moments: what the probe measured, after the inner loop of a probed step; else None.
        decision: the next plan and its reason, after the inner loop. With an engine that reduces gradients when the
            update begins (DeepSpeed), all three are there after the update.
        timed: a plan and how many seconds a step of it lately took, for a criterion that needs it, after the inner loop
            of a probed step; else None.
        probed: whether gradients are measured in this step.
        portion: this rank's micro-batches and how many examples they hold.
    """

    def __init__(
        self,
        plan: BatchPlan,
        portion: Portion,
        *,
        engine: Engine,
        probe: Probe | None,
        votes: Votes,
        find_nonfinite: FindNonfinite | None,
        stopwatch: Stopwatch | None,
        mark: Mark,
        check_trained: Callable[[], None],
        finish: Callable[[Step], None],
    ) -> None:
        self.plan = plan
        self.global_batch_size = portion.num_examples
        self.loss: float | None = None
        self.moments: GradientMoments | None = None
        self.decision: Decision | None = None
        self.timed: tuple[BatchPlan, float] | None = None
        self.probed = probe is not None
        self.portion = portion
        self._engine = engine
        self._probe = probe
        self._votes = votes
        self._all_finite = True
        self._stopwatch = stopwatch
        self._mark = mark
        self._check_trained = check_trained
        self._finish = finish
        self._losses: Tensor | None = None  # this rank's mean loss so far, shape (), float64
        self._weights = portion.weights or LossWeights(portion.sizes, portion.num_examples)
        # The ranks' gradients are averaged, so of a rank's own each micro-batch is its share of the whole, times them;
        # a rank that steps alone has a whole of its own.
        alone = engine.steps_alone()
        self._find_nonfinite = None if alone else find_nonfinite  # to agree on it would cost what such steps save
        self._whole = sum(self._weights.of_each) if alone else self._weights.total / engine.collectives.size
        self._weight = 0.0  # of the micro-batch that is being run, 0 outside the inner loop
        self._num_backward = 0
        self._begun = False
        self._ended = False

    @property
    def finite(self) -> bool:
        """Whether loss and gradients were finite on every rank, as far as they were measured."""
        measured = self.moments is None or self.moments.is_finite
        return self._all_finite and measured and (self.loss is None or math.isfinite(self.loss))

    @property
    def waits(self) -> bool:
        """Whether the micro-batches are all run, and nothing is measured and decided yet."""
        return self._ended and self.decision is None

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches. Gradients are synchronized in the last one only, or in each (``gradient_sync``).

        Raises:
            RuntimeError: ``backward`` was not called exactly once for a micro-batch, or a second iteration.
        """
        if self._begun:
            raise RuntimeError("the micro-batches of a step can be run only once: take the next step")
        self._begun = True
        self._engine.begin(self.plan)
        if self._probe is not None:
            self._probe.start(self._engine.collectives.size)
        num_parts = len(self.portion.sizes)
        for index, batch in enumerate(self.portion.batches):
            self._weight = self._weights.of_each[index]
            self._mark("the forward", micro_batch=index)
            with nullcontext() if index == num_parts - 1 else self._engine.no_sync():
                yield batch
            self._weight = 0.0
            if self._num_backward != index + 1:
                raise RuntimeError(
                    f"step.backward(loss) must be called once for each micro-batch: after micro-batch {index + 1} of "
                    f"{num_parts} it had been called {self._num_backward} times"
                )
            if index < num_parts - 1:
                self._mark("the loading", micro_batch=index + 1)
        self._engine.gradient_ready(sum(self._weights.of_each))
        self._ended = True
        if self._engine.reduced == "backward":
            self.settle()

    def settle(self, *, reduced: bool = True) -> None:
        """Measures and decides: the end of a step, once its gradient is reduced.

        Args:
            reduced: False where it never was, since the engine found it not finite and left the update out.
        """
        if self._stopwatch is not None:
            self._stopwatch.ran(self.plan, whole=self.global_batch_size == self.plan.global_batch_size)
        self._mark("the measuring")
        if self._probe is not None and reduced:
            self._measure(self._probe)
        elif self._find_nonfinite is not None and reduced:
            self._look_through(self._find_nonfinite)
        else:
            self._votes.step_without_reduction()
        if self._probe is not None and not reduced:
            plan, size = self.plan, float(self.global_batch_size)
            self.moments = GradientMoments(math.nan, plan.micro_batch_size, math.nan, size, plan.num_parts)
        self._finish(self)

    def backward(self, loss: Tensor) -> None:
        """Backward of the mean loss of this micro-batch, weighted so that the step's gradient is the mean of all.

        All are the micro-batches of all ranks: each counts for its examples, or for what ``steps(weigh=)`` says. It
        scales the loss where ``AdaptiveBatch`` was given a ``scaler``: give it the loss as it is.

        Args:
            loss: mean loss over the micro-batch, shape ().

        Raises:
            ValueError: a loss that is not a scalar tensor.
            RuntimeError: a call outside the inner loop.
        """
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"step.backward takes the mean loss of the micro-batch, a scalar; got a {got}: average it over the "
                f"examples first, as a tensor"
            )
        if self._weight == 0:
            raise RuntimeError("step.backward belongs inside `for batch in step`, once for each micro-batch")
        if self._num_backward == 0:
            self._check_trained()
        self._mark("the backward", micro_batch=self._num_backward)
        weight, parts = self._weight / self._whole, self._whole / self._weight
        # A division where the parts are equal: it gives the bits of a hand-written `loss / accumulation_steps`.
        share = loss if parts == 1 else loss / parts if parts.is_integer() else loss * weight
        if self._probe is None:
            self._engine.backward.run(share)
        else:
            self._probe.begin_part()
            self._engine.backward.run(share)
            self._probe.end_part(self._weight * self.portion.num_examples / self._weights.total, weight)
        if self._probe is not None or self._find_nonfinite is not None:
            value = loss.detach().double() * weight
            self._losses = value if self._losses is None else self._losses + value
        self._mark("what follows the backward", micro_batch=self._num_backward)
        self._num_backward += 1

    def _look_through(self, find_nonfinite: FindNonfinite) -> None:
        """Whether loss and gradient of all ranks are finite, in one reduction and one host sync."""
        assert self._losses is not None
        found = find_nonfinite(self._losses)
        numbers = torch.cat([found, *self._votes.outgoing(found)])
        (total,) = self._votes.incoming(self._engine.collectives.sum(numbers).tolist())  # host sync
        self._all_finite = total == 0

    def _measure(self, probe: Probe) -> None:
        """Loss and moments of all ranks, in one reduction and one host sync; without the scale of the gradients."""
        size, scale = self._engine.collectives.size, self._engine.backward.scale
        local = probe.collect()
        assert self._losses is not None
        means = [self._losses.to(local.device)]  # a loss may live elsewhere than the model
        if scale is not None:  # summed as well, so that all ranks divide by the same bits
            means.append(scale(local.device).double())
        riders: list[Votes | Stopwatch] = [self._votes]
        if self._stopwatch is not None:
            riders.append(self._stopwatch)
        carried = [number for rider in riders for number in rider.outgoing(local)]
        numbers = torch.cat([local, torch.stack(means) / size, *carried])
        totals = self._engine.collectives.sum(numbers).tolist()  # host sync
        for rider in reversed(riders):
            totals = rider.incoming(totals)
        self.timed = None if self._stopwatch is None else self._stopwatch.timed
        factor = 1.0 if scale is None else totals.pop()
        self.loss = totals.pop()
        self.moments = probe.moments(totals).scaled(
            1 / factor if factor else math.inf
        )  # not finite where backed off to 0
