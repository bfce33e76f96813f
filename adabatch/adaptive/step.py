"""``Step``: one optimizer step of a run, as the training loop sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adabatch.batch.control import Decision
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan
from adabatch.guards.finite import FindNonfinite
from adabatch.guards.loop_mistakes import LoopMistakes
from adabatch.guards.rank_places import RankPlaces
from adabatch.guards.same_updates import SameUpdates
from adabatch.guards.votes import Votes
from adabatch.runtime.collectives import explained
from adabatch.runtime.data import LossWeights, Portion
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.observers.empty_parts import EmptyParts
from adabatch.runtime.observers.protocol import (
    Moment,
    Phase,
    RankMean,
    Rider,
    StepObserver,
    SumsUnderWay,
    start_summed,
    summed,
)
from adabatch.runtime.observers.trained_parameters import TrainedParameters, raise_first
from adabatch.runtime.optimizers.measured_norm import MeasuredNorm
from adabatch.runtime.probes.protocol import Probe


@dataclass(frozen=True, kw_only=True)
class StepTools:
    """What all steps of a run share.

    Args:
        engine: how the model runs.
        votes: whether to stop or save; they ride on each reduction.
        observers: hear of each phase.
        places: tell the other ranks of an error of this one; None if there are none, or they cannot be told.
        riders: on the reductions that measure, beside those that ride on each.
        mistakes: of the loop, which are checked before and after each backward.
        empty_parts: run the micro-batches of weight 0.
        trained: the parameters for which the run was set up; None if nothing relies on them.
        same_updates: whether the ranks are about to make the same update; None if they are not compared.
        find_nonfinite: whether loss and gradient are finite, if no probe reads them; None if that is not checked.
        late: whether what a step measured is read at the end of the next one.
    """

    engine: Engine
    votes: Votes
    observers: StepObserver
    places: RankPlaces | None
    riders: Sequence[Rider]
    mistakes: LoopMistakes
    empty_parts: EmptyParts
    trained: TrainedParameters | None
    same_updates: SameUpdates | None
    find_nonfinite: FindNonfinite | None
    late: bool

    def shared(self) -> AbstractContextManager[None]:
        """Tells the other ranks of an error that is raised in the block, and names the error of another rank."""
        return nullcontext() if self.places is None else self.places.shared()


class Step:
    """One optimizer step: iterate over its micro-batches, and call ``backward`` once for each of them.

    ``AdaptiveBatch.steps`` yields these objects.

    Attributes:
        plan: micro-batch size, accumulation steps and data-parallel size, fixed before the step began.
        number: of the step, as in the journal.
        global_batch_size: number of examples in the step, over all ranks.
        loss: mean training loss over all ranks; None before the end of the inner loop, and in a step without a probe.
            With ``Measure(late=True)``, loss and moments are None until the end of the next step.
        moments: what the probe measured; None before the end of the inner loop, and in a step without a probe.
        decision: the next plan and its reason; None before the end of the inner loop. If the engine reduces gradients
            only when the update begins (DeepSpeed), these three are set by the update.
        probed: whether gradients are measured in this step.
        measured: whether gradients and loss have been measured. They never are if the engine left out the update.
        portion: this rank's micro-batches and their numbers of examples.
    """

    def __init__(
        self,
        plan: BatchPlan,
        portion: Portion,
        *,
        number: int,
        probe: Probe | None,
        tools: StepTools,
        finish: Callable[[Step], None],
    ) -> None:
        self.plan = plan
        # what it holds, not what was planned: a pass may end with a shorter step
        self.global_batch_size = portion.num_examples
        self.loss: float | None = None
        self.moments: GradientMoments | None = None
        self.decision: Decision | None = None
        self.probed = probe is not None
        self.measured = False
        self.portion = portion
        self._tools = tools
        self._engine = engine = tools.engine
        self._mistakes = tools.mistakes
        self._trained = tools.trained
        self._probe = probe
        self._all_finite = True
        self.number = number
        self._finish = finish
        self._sums: SumsUnderWay | None = None
        self._losses: Tensor | None = None  # this rank's mean loss so far, shape (), float64
        self._weights = portion.weights or LossWeights(portion.sizes, portion.num_examples)
        # The reduction averages over the ranks, so each micro-batch is weighted by its share in all micro-batches,
        # times the number of ranks. A rank that steps alone averages over its own micro-batches only.
        alone = engine.steps_alone()
        # To agree on it the ranks would have to communicate, which local steps are there to save: each worker leaves
        # out its own update. The ranks of a sharded worker would have to agree nevertheless.
        self._find_nonfinite = None if alone else tools.find_nonfinite
        self._unread: Callable[[], None] | None = None  # takes in what was measured
        self._find_own = tools.find_nonfinite if alone and probe is None and not engine.shards else None
        self._own_is_finite = True
        self._whole = sum(self._weights.of_each) if alone else self._weights.total / engine.collectives.size
        # Without a reduction at the end of the step, no rank could tell the others of a mistake of its own. An error
        # that was raised earlier would leave them waiting for this rank's gradients.
        reduces = probe is not None or self._find_nonfinite is not None
        self._tells = engine.collectives.size > 1 and reduces and not alone and engine.reduced == "backward"
        self._told: str | None = None  # this rank's mistake, which all ranks hear of at the end of the step
        self._zeros = False  # its parameters have changed, and it sends zeros for those that the others wait for
        self._flags: list[tuple[Tensor, bool]] = []  # parameters that were put back as they were, until then
        self._weight: float | None = None  # of the micro-batch that is being run; None outside the inner loop
        self._num_backward = 0
        self._begun = False
        self._ended = False

    @property
    def empty(self) -> bool:
        """Whether all its micro-batches have weight 0 (``steps(weigh=)``). Its update is then left out."""
        return self._whole == 0

    @property
    def finite(self) -> bool:
        """Whether loss and gradients were finite on all ranks, as far as they were measured."""
        measured = self.moments is None or self.moments.is_finite
        return not self.empty and self._all_finite and measured and (self.loss is None or math.isfinite(self.loss))

    @property
    def left_out_alone(self) -> bool:
        """Whether this rank, which steps alone, leaves its update out, because its loss or gradient was not finite."""
        return not self._own_is_finite

    @property
    def waits(self) -> bool:
        """Whether all micro-batches have run, but nothing has been measured and decided yet."""
        return self._ended and self.decision is None

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches. Gradients are synchronized in the last one only, or in each (``gradient_sync``).

        Raises:
            RuntimeError: if ``backward`` was not called exactly once for a micro-batch, or on a second iteration. A
                micro-batch of weight 0 may be skipped, unless it is the last one and other ranks wait for it.
        """
        if self._begun:
            raise RuntimeError("the micro-batches of a step can be run only once: take the next step")
        self._begun = True
        self._engine.begin(self.plan)
        self._mistakes.step_begins()
        if self._tells and self._engine.stand_in == "flags" and self._trained is not None:
            self._told = self._trained.changes("AdaptiveBatch")
            self._flags = self._trained.put_back()
        if self._probe is not None:
            self._probe.start(self._engine.collectives.size)
        num_parts = len(self.portion.sizes)
        for index, batch in enumerate(self.portion.batches):
            weight = self._weight = self._weights.of_each[index]
            self._enter(Phase.FORWARD, index)
            listening = nullcontext() if weight else self._tools.empty_parts.listening()
            # around the loop's own code, because DDP reads its switch in the forward, not in the backward
            with listening, nullcontext() if index == num_parts - 1 else self._engine.no_sync():
                yield batch
            self._weight = None
            with self._tools.shared():
                self._check_run(index, weight)
            # after the last one the observers hear of the measurement next
            if index < num_parts - 1:
                self._enter(Phase.LOADING, index + 1)
        with self._tools.shared():
            self._end()

    def _check_run(self, index: int, weight: float) -> None:
        """Checks that the loop has run a micro-batch, or may pass it over."""
        num_parts = len(self.portion.sizes)
        if weight == 0 and self._num_backward == index:
            self._pass_over(last=index == num_parts - 1)
        if self._num_backward != index + 1:
            raise RuntimeError(
                f"step.backward(loss) must be called once for each micro-batch: after micro-batch {index + 1} of "
                f"{num_parts} it had been called {self._num_backward} times (not loss.backward())"
            )

    def _end(self) -> None:
        """The last micro-batch was run."""
        self._hear(self._mistakes.check_untouched)
        weight = sum(self._weights.of_each)
        self._engine.gradient_ready(weight)
        if weight:
            self._hear(self._mistakes.check_reached)
        self._mistakes.check_reduced()
        self._ended = True
        # otherwise the gradient is reduced when the update begins, and the step is settled there
        if self._engine.reduced == "backward":
            self.settle()
        self._engine.inner_loop_ended()

    def measured_norm(self) -> MeasuredNorm | None:
        """The norm that was measured of the gradients as the optimizer finds them; None if they are others.

        Without a probe nothing was measured, a rank that steps alone uses its own gradient, and a gradient scaler
        divides the gradients before the update.
        """
        parameters = None if self._probe is None else self._probe.measured
        if self.moments is None or not self.measured or parameters is None or self._engine.backward.scale is not None:
            return None
        square = self.moments.euclidean_sq
        return None if square is None or self._engine.steps_alone() else MeasuredNorm.of(square, parameters)

    @property
    def unread(self) -> bool:
        """Whether the step was measured, and its numbers were not read yet (``Measure(late=True)``)."""
        return self._unread is not None

    @property
    def is_there(self) -> bool:
        """Whether the numbers of a step that is unread can be read without a wait."""
        return self._sums is not None and self._sums.is_there

    def read(self) -> None:
        """Takes in what was measured, if that was not read yet."""
        unread, self._unread = self._unread, None
        if unread is not None:
            unread()

    def check_read(self) -> None:
        """Raises what the ranks told each other with their measurement. Call it on all ranks at the same place.

        Raises:
            RuntimeError: if a rank made a mistake in the step.
            RanksDrifted: if the ranks made different updates.
        """
        if self.loss is not None and not math.isfinite(self.loss):
            self._raise_told()
        self._check_same_updates()

    def settle(self, *, reduced: bool = True) -> None:
        """Ends the step once its gradient is reduced: measures, and decides on the next plan.

        Args:
            reduced: False if it never was, since the engine found it not finite and left the update out.
        """
        reduced = reduced and not self.empty
        self._enter(Phase.MEASURING)
        if self._probe is not None and reduced:
            self._measure(self._probe)
        elif self._find_nonfinite is not None and reduced:
            self._look_through(self._find_nonfinite)
        else:
            self._tools.votes.step_without_reduction()
            if self._find_own is not None and reduced:
                self._own_is_finite = not bool(self._find_own(self._own_loss(torch.device("cpu"))))  # host sync
            if self._told is not None:  # all micro-batches weigh nothing, so that no rank waits for this one
                self._restore_flags()
                raise RuntimeError(self._told)
        if self._probe is not None and not reduced:
            self._probe.stop()
            plan, size = self.plan, float(self.global_batch_size)
            # not None, which would read as "not probed" in the journal
            self.moments = GradientMoments(math.nan, plan.micro_batch_size, math.nan, size, plan.num_parts)
        self._finish(self)

    def break_off(self) -> None:
        """The loop has left the step before its end, by ``break`` or an error, and it is not run any further."""
        if self._probe is not None and self.decision is None and not self.waits:
            self._probe.stop()
        self._restore_flags()
        self._mistakes.forget()

    def backward(self, loss: Tensor) -> None:
        """Runs the backward of this micro-batch's mean loss.

        The loss is weighted so that the gradient of the step is the mean over all micro-batches of all ranks. Each
        counts for its number of examples, or for what ``steps(weigh=)`` returned. Do not divide the loss by the number
        of accumulation steps. If ``AdaptiveBatch`` was given a ``scaler``, the loss is scaled here. The loss of a
        micro-batch of weight 0 is not read.

        Args:
            loss: mean loss over the micro-batch, shape ().

        Raises:
            ValueError: if the loss is not a scalar tensor, or has no gradient.
            RuntimeError: if it is called outside the inner loop.
            RankLost: if another rank has raised an error in this step, and told so.
        """
        with self._tools.shared():
            self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"step.backward takes the mean loss of the micro-batch, a scalar tensor, got a {got}: average the "
                f"losses of the examples first, without turning them into a number"
            )
        if self._weight is None:
            raise RuntimeError("step.backward belongs inside `for batch in step`, once for each micro-batch")
        if self._weight and not loss.requires_grad:
            raise ValueError(
                "the loss of the micro-batch has no gradient: it was computed under torch.no_grad() or "
                "inference_mode(), from detached tensors, or by a model all of whose parameters are frozen"
            )
        if self._num_backward == 0 and self._trained is not None:  # by now the loop has frozen and thawed what it will
            self._check_trained(self._trained)
        self._hear(self._mistakes.check_before_backward)
        self._hear(lambda: self._mistakes.check_loss(loss, len(self.portion.sizes)))
        self._mistakes.check_switches(last=self._num_backward == len(self.portion.sizes) - 1)
        self._enter(Phase.BACKWARD, self._num_backward)
        if self._zeros:
            self._backward_as_before()
            self._num_backward += 1
            return
        if self._weight == 0:
            self._backward_of_nothing()
            self._mistakes.backward_ended()
            self._num_backward += 1
            return
        weight, parts = self._weight / self._whole, self._whole / self._weight
        # A division where the parts are equal: it gives the bits of a hand-written `loss / accumulation_steps`.
        share = loss if parts == 1 else loss / parts if parts.is_integer() else loss * weight
        if self._probe is None:
            self._run_backward(share)
        else:
            self._probe.begin_part(self.portion.sizes[self._num_backward])
            self._run_backward(share)
            self._probe.end_part(self._weight * self.portion.num_examples / self._weights.total, weight)
        self._mistakes.backward_ended()
        if self._probe is not None or self._find_nonfinite is not None or self._find_own is not None:
            # float64, since hundreds of micro-batches may be added; and on the device, without a host sync
            value = loss.detach().double() * weight
            self._losses = value if self._losses is None else self._losses + value
        self._enter(Phase.AFTER_BACKWARD, self._num_backward)
        self._num_backward += 1

    def _check_trained(self, trained: TrainedParameters) -> None:
        """Whether the parameters are those of the run; if they are not, the ranks raise the error at the step's end."""
        if self._engine.steps_alone():  # LocalSGD tells the workers at their next average
            return
        changes = trained.changes("AdaptiveBatch")
        if changes is None:
            return
        stand_in = self._engine.stand_in
        # Flags that were changed since the step began cannot be put back after the forward.
        if not self._tells or stand_in is None or (stand_in == "flags" and trained.flags()):
            raise RuntimeError(changes)
        self._told = self._told or changes
        self._zeros = self._engine.stand_in == "zeros"

    def _hear(self, check: Callable[[], None]) -> None:
        """Runs a check of the loop. Its error is raised at the end of the step, on all ranks, if there are others."""
        try:
            check()
        except RuntimeError as error:
            if not self._tells:
                raise
            self._told = self._told or str(error)

    def _raise_told(self) -> None:
        """Raises the mistakes of single ranks on all ranks, after a step that was not finite.

        The loss of a rank with a mistake is NaN, so that the question costs nothing in other steps.
        """
        if self._tells and any(self._engine.collectives.sum_of(float(self._told is not None))):
            self._restore_flags()
            raise_first(self._told, self._engine.collectives)

    def _restore_flags(self) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags.clear()

    def _backward_as_before(self) -> None:
        """The backward of a rank whose parameters have changed: it sends zeros for those that the others wait for."""
        assert self._trained is not None
        if self._probe is not None:
            self._probe.begin_part()
        # the micro-batch in which the ranks reduce; in the others nobody waits
        if self._num_backward == len(self.portion.sizes) - 1:
            with self._trained.zero() as zero:
                self._run_backward(zero)
        if self._probe is not None:
            self._probe.end_part(0.0, 0.0)

    def _run_backward(self, loss: Tensor) -> None:
        with explained():  # DDP and FSDP2 reduce in it
            self._engine.backward.run(loss)

    def _backward_of_nothing(self) -> None:
        """The backward of a micro-batch of weight 0, for which other ranks may be waiting."""
        zero = self._tools.empty_parts.zero()
        if self._probe is not None:
            self._probe.begin_part()
        if zero is not None:
            self._run_backward(zero)
        elif not self._runs_without(last=self._num_backward == len(self.portion.sizes) - 1):
            raise RuntimeError(
                "a micro-batch of weight 0 must still take part in the reduction of gradients, but no gradient of zero "
                "could be sent through its forward: call the model that was given to AdaptiveBatch, and let "
                "it return its predictions beside a loss that is not finite"
            )
        if self._probe is not None:
            self._probe.end_part(0.0, 0.0)

    def _pass_over(self, *, last: bool) -> None:
        """The loop skipped a micro-batch of weight 0."""
        if not self._runs_without(last=last):
            raise RuntimeError(
                "a micro-batch of weight 0 was skipped, but the other ranks wait for its backward: run its forward all "
                "the same, and call step.backward(loss), which does not read the loss"
            )
        if self._probe is not None:
            self._probe.end_part(0.0, 0.0)
        self._num_backward += 1

    def _runs_without(self, *, last: bool) -> bool:
        """Whether this rank can skip a micro-batch without another rank waiting for it."""
        alone = self._engine.collectives.size == 1 or self._engine.steps_alone()
        return self._engine.runs_alone and (alone or not last)

    def _enter(self, phase: Phase, micro_batch: int | None = None) -> None:
        self._tools.observers.at(phase, Moment(self.number, self.plan, micro_batch, self.global_batch_size))

    def _look_through(self, find_nonfinite: FindNonfinite) -> None:
        """Whether loss and gradient of all ranks are finite, in one reduction and one host sync."""
        found = find_nonfinite(self._own_loss(self._engine.collectives.device))
        (total,) = summed(self._engine.collectives, found, self._riders_of_all())
        self._all_finite = total == 0
        if not self._all_finite:
            self._raise_told()
        self._check_same_updates()

    def _riders_of_all(self) -> list[Rider]:
        """The riders of each reduction, whatever it is of."""
        votes, same_updates = self._tools.votes, self._tools.same_updates
        return [votes] if same_updates is None else [votes, same_updates]

    def _check_same_updates(self) -> None:
        if self._tools.same_updates is not None:
            self._tools.same_updates.check(self.number)

    def _own_loss(self, device: torch.device) -> Tensor:
        """This rank's share of the mean loss; 0 if its micro-batches weigh nothing, NaN if it made a mistake."""
        if self._told is not None:
            return torch.full((), math.nan, dtype=torch.float64, device=device)
        if self._losses is None:
            return torch.zeros((), dtype=torch.float64, device=device)
        return self._losses.to(device)  # a loss may live elsewhere than the model

    def _measure(self, probe: Probe) -> None:
        """Loss and moments over all ranks, unscaled, in one reduction and one host sync."""
        ranks, local = self._engine.collectives, probe.collect()
        loss = RankMean(self._own_loss(local.device), ranks.size)
        scale = self._engine.backward.scale
        # Averaged as well, so that all ranks divide by the same bits.
        scales = [] if scale is None else [RankMean(scale(local.device), ranks.size)]
        # one collective: a small all-reduce costs its latency, however many numbers it carries
        riders = [loss, *scales, *self._riders_of_all(), *self._tools.riders]
        if self._tools.late:
            self._tools.votes.step_without_reduction()  # those of this step are counted when they are read
            self._sums = sums = start_summed(ranks, local, riders)
            self._unread = lambda: self._take_in(probe, sums.read(), loss, scales)
            return
        totals = summed(ranks, local, riders)
        self._take_in(probe, totals, loss, scales)

    def _take_in(self, probe: Probe, totals: list[float], loss: RankMean, scales: Sequence[RankMean]) -> None:
        self.loss, self.measured = loss.value, True
        if not self._tools.late:  # else where all ranks are sure to come to it
            self.check_read()
        self.moments = probe.moments(totals)
        for factor in scales:  # a scale that was backed off to 0 makes the moments infinite
            self.moments = self.moments.scaled(1 / factor.value if factor.value else math.inf)
