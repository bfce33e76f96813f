"""``AdaptiveBatch``: the one stateful object, where pure decisions and running torch meet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import BatchPlan, Duration, Progress, micro_batch_sizes
from adabatch.guards.drift import DriftCheck
from adabatch.guards.finite import nonfinite_in
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.left_out import UpdatesInARow
from adabatch.guards.memory_trials import Trials
from adabatch.guards.missing_updates import MissingUpdates
from adabatch.guards.votes import Votes
from adabatch.journal import Journal, line
from adabatch.lr.follow import Followers, UpdateScaling
from adabatch.lr.rules import LRRule, Setting
from adabatch.options import EngineOptions, Guard, Measure
from adabatch.planning import Measured, Planner, Policy, check_format
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import GlobalOrder, num_examples_in
from adabatch.runtime.data.passes import LoaderPasses, OrderPasses, Passes, check_loader
from adabatch.runtime.data.portions import Feed
from adabatch.runtime.empty_parts import EmptyParts
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.local_sgd import LocalSGD
from adabatch.runtime.observers import Moment, Observers, Phase
from adabatch.runtime.optimizers import each_of, joined, kind_of
from adabatch.runtime.ownership import take_over
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.step_hooks import StepHooks, StepOverrides, host_value
from adabatch.runtime.stopwatch import Stopwatch
from adabatch.runtime.trained_parameters import TrainedParameters
from adabatch.step import Step
from adabatch.validation import (
    check_before_step,
    check_until,
    checked_rules,
    engine_of,
    limits_and_grid,
    measured_layers,
    needs_of,
    suited_probe,
    warn_without_room,
)

_log = logging.getLogger("adabatch")


@dataclass
class _Update:
    """What waits between the end of a step's inner loop and its ``optimizer.step()``."""

    number: int
    num_examples: int
    scaling: UpdateScaling
    gain: float | None
    finite: bool
    looked_at: bool  # whether loss and gradient were, so that `finite` is known
    empty: bool  # none of its micro-batches weighs anything
    entry: dict[str, Any]
    left_out: bool = False  # the loop said so


class AdaptiveBatch:
    """Lets the global batch size follow a criterion, and the learning rate follow the batch, around a loop of yours.

    ::

        batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=16,
                                limits=Limits(min=64, max=4096), lr_rule="sqrt")
        for step in batches.steps(loader):
            for x, y in step:
                step.backward(loss_fn(model(x), y))
            optimizer.step(); optimizer.zero_grad()

    Args:
        model: plain, wrapped in ``DistributedDataParallel``, or sharded by ``fully_shard`` (FSDP2; torch 2.9 for a
            criterion that needs a probe).
        optimizer: its ``step()`` counts as an update, and runs with the batch factor on the learning rates. Of the
            model's gradients those of the parameters that it holds are measured. A list of several optimizers, each
            with parameters of its own, makes one update: it is done when all have stepped, in any order, and all run
            with the same factor, or leave a step out together. An optimizer has one ``AdaptiveBatch``: a new one on it,
            or on another optimizer of the same parameters, takes the older one off, whose ``steps()`` raises from then
            on.
        criterion: which batch size to ask for; a ``Schedule`` needs no probe.
        micro_batch_size: examples in one forward and backward on one rank; what your loader yields (at most, where its
            micro-batches vary, which ``steps(count=)`` must then count).
        limits: smallest and largest global batch size; the run starts at the smallest. May be left out for a schedule.
        max_micro_batch_size: with a ``GlobalOrder``, how far the micro-batch may grow (by doubling) before steps
            accumulate; by default it stays as it is.
        control: how cautiously the criterion is followed; by default the batch grows and shrinks, and waits for the
            end of the schedule's warm-up before it grows.
        lr_rule: how the learning rate follows the batch: "none", "linear", "sqrt", "gain" or "sqrt_gain". By default
            "sqrt" for ``KFAC`` and ``Shampoo``, for which nobody has derived a rule and this one is in use (arXiv
            2602.03001), "sqrt" ("linear" for ``SGD``) with a ``Seesaw`` schedule, whose decay of the learning rate
            comes on top of it, and "none" for all others.
        follow: what else follows the batch while an update runs: "betas", "eps", "weight_decay" (decoupled), so that
            the optimizer's memory and decay stay what they are in examples at the reference batch size. With "betas",
            the optimizer's step counts are in updates of that size, so that its bias correction stays right; the betas
            stop at floors (0.5 and 0.95), which ``lr.Followers`` moves.
        reference_batch_size: the global batch size that the base LR is meant for; by default the run's first.
        tokens_per_example: lets durations be given in tokens.
        probe: how gradients are measured; by default chosen by the engine.
        local_sgd: the ``LocalSGD`` of this model and optimizer, which averages the workers now and then; a plain model
            on several processes needs it. Gradients are measured once per round.
        journal: where the first rank writes one JSON line per step.
        measure: what is measured beside what the criterion needs: noise, norms, layers.
        guard: what is checked and tried: updates that are not finite, larger micro-batches, ranks that drift.
        engine: options of the engine that the model's type names, such as a gradient scaler; or, for hosts, an engine.

    Raises:
        ValueError: limits that the ranks or the micro-batch cannot carry out, a criterion that needs more than the
            probe gives, a model without trainable parameters or an optimizer of another model, an unknown rule, a
            size below 1, a trial of what no rank can try alone or of a micro-batch that does not grow.
        TypeError: something in the place of the optimizer, the criterion, its needs or the scaler that is not one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        criterion: Criterion,
        *,
        micro_batch_size: int,
        limits: Limits | None = None,
        max_micro_batch_size: int | None = None,
        control: Control | None = None,
        lr_rule: LRRule | None = None,
        follow: Followers | Collection[Setting] = (),
        reference_batch_size: int | None = None,
        tokens_per_example: int | None = None,
        probe: Probe | None = None,
        local_sgd: LocalSGD | None = None,
        journal: str | Path | None = None,
        measure: Measure = Measure(),
        guard: Guard = Guard(),
        engine: EngineOptions | Engine = EngineOptions(),
    ) -> None:
        optimizer = joined(optimizer)
        rules = checked_rules(
            model,
            optimizer,
            criterion,
            lr_rule=lr_rule,
            follow=follow,
            reference_batch_size=reference_batch_size,
            tokens_per_example=tokens_per_example,
        )
        self._engine = engine_of(model, optimizer, engine, local_sgd)
        needs = needs_of(criterion, rules.rule, measure)
        layers = measured_layers(model, optimizer, needs, measure, probe)
        largest = micro_batch_size if max_micro_batch_size is None else max_micro_batch_size
        # For recorded norms alone a probe measures no noise, and needs no parts to do so.
        in_noise = probe is not None or bool(replace(needs, l1=False))
        limits, grid = limits_and_grid(
            limits,
            criterion,
            dp_size=self._engine.collectives.size,
            num_compared=self._engine.num_compared,
            micro_sizes=micro_batch_sizes(micro_batch_size, largest),
            in_parts=in_noise and not (probe is not None and probe.gives.examples),
        )
        policy = Policy(
            criterion=criterion,
            control=control or Control(),
            limits=limits,
            rules=rules,
            reference_batch_size=reference_batch_size,
            tokens_per_example=tokens_per_example,
            counts_gain=in_noise,
            layer_weights=layers.weights,
        )
        self._planner = Planner(policy, grid)
        largest_ratio = limits.at(self._planner.consumed)[1] / self._planner.reference
        warn_without_room(optimizer, rules.followers, largest_ratio)
        self._optimizer = optimizer
        self._groups = optimizer.param_groups
        self._grows_micro_batch = max_micro_batch_size is not None
        self._step: Step | None = None  # the one under way, until it is decided
        self._update: _Update | None = None  # the one that its end prepared, until it is done
        self._begun: _Update | None = None  # the one that the optimizer last ran, for an engine that runs it in pieces
        self._running = False  # the loop stands inside a step
        self._gone: str | None = None  # why this object is not to be used any more
        self._owns_probe = probe is None
        self._just_loaded = False  # then a loader, loaded too, may stand behind its last micro-batch
        self._skip_nonfinite = bool(guard.skip_nonfinite)
        # A scaler judges each of several optimizers alone, and would leave out a part of an update.
        self._scaled = self._engine.backward.scale is not None
        looks = guard.skip_nonfinite is True or (self._scaled and len(each_of(optimizer)) > 1)
        self._find_nonfinite = nonfinite_in(optimizer) if looks else None
        self._updates_in_a_row = UpdatesInARow(guard.max_left_out)
        self._missing = MissingUpdates(kind_of(optimizer))
        self._empty_parts = EmptyParts(model)
        self._journal = Journal(journal if self.collectives.rank == 0 else None)
        self._votes = Votes(self.collectives)
        self._heartbeat = Heartbeat()
        self._stopwatches = [Stopwatch(self.collectives.size)] * criterion.needs.seconds
        self._observers = Observers(self._heartbeat, *self._stopwatches)
        if guard.check_every is not None:
            check = DriftCheck(
                self._engine, optimizer, self._planner, every=guard.check_every, observers=self._observers
            )
            self._observers.add(check)
        self._tell_engine()

        # Last, so that a constructor that raises leaves no hook behind. A predecessor goes first: some hooks can be set
        # once only, and its removal would take off those of the new probe.
        held = [p for group in optimizer.param_groups for p in group["params"]]
        take_over(self, [*each_of(optimizer), *held], kind="AdaptiveBatch")
        self._probe = suited_probe(optimizer, needs, given=probe, engine=self._engine, layers=layers.make)
        try:
            self._trials = Trials(guard.trial, self._engine, self._probe, grid.micro_sizes)
            everything = probe is not None or self._engine.reduced == "update"  # those hold other tensors
            measured = self._probe is not None or self.collectives.size > 1
            self._trained = TrainedParameters(model, optimizer, all_of_model=everything) if measured else None
            self._hooks = StepHooks(optimizer, moved=self._moved, skip=self._skips_update, done=self._update_done)
        except Exception:
            if probe is None and self._probe is not None:
                self._probe.remove()
            raise

    # --- what a schedule, a progress bar or a log reads -------------------------------------------------------------

    @property
    def plan(self) -> BatchPlan:
        """The plan of the next step (inside a step: of the one after it, once the inner loop is over)."""
        return self._planner.plan

    @property
    def progress(self) -> Progress:
        """What the applied updates consumed so far."""
        return self._planner.progress

    @property
    def consumed(self) -> Progress:
        """What all steps consumed so far, those among them whose update was left out."""
        return self._planner.consumed

    @property
    def progress_after_next(self) -> Progress:
        """What the applied updates will have consumed when the next planned step is applied."""
        return self._planner.after_next()

    @property
    def noise_scale(self) -> float:
        """Averaged noise over averaged signal, in examples; NaN while unknown."""
        return self._planner.state.averages.noise_scale

    @property
    def lr_factor(self) -> float:
        """The batch factor that ``optimizer.step()`` applies next."""
        if self._update is not None:
            return self._update.scaling.factor
        return self._planner.scaling(self.plan.global_batch_size).factor

    @property
    def journal(self) -> Journal:
        """Where the steps are written down; ``path`` is None on all ranks but the first."""
        return self._journal

    @property
    def collectives(self) -> Collectives:
        """The ranks of the run."""
        return self._engine.collectives

    @property
    def too_large(self) -> int | None:
        """The smallest micro-batch size that ran out of memory in its trial; None where none did."""
        return self._trials.too_large

    @property
    def heartbeat(self) -> Heartbeat:
        """Where this rank is in the run; for a ``Watchdog``."""
        return self._heartbeat

    @property
    def votes(self) -> Votes:
        """Whether the ranks stop or save after this step; see ``Preemption`` and ``Checkpoints``."""
        return self._votes

    def hold_growth_until(self, duration: Duration | None) -> None:
        """Lets the batch not grow before so much of the run is over, where its ``Control`` names no length itself.

        A ``ProgressLR`` with a warm-up says so by itself: noise and signal of the first steps are seldom those of the
        run, and a batch that grows while the learning rate does takes from the warm-up the steps that it needs.

        Raises:
            ValueError: a unit that this run does not count.
        """
        if duration is not None:
            self.progress.count(duration.unit)
        self._planner.hold_until = duration

    # --- the loop ---------------------------------------------------------------------------------------------------

    def steps(
        self,
        loader: GlobalOrder | Iterable[Any],
        *,
        until: Duration | None = None,
        count: Callable[[Any], int] = num_examples_in,
        weigh: Callable[[Any], float] | None = None,
        allow_same_data: bool = False,
    ) -> Iterator[Step]:
        """The steps of one pass over the data, or of as many as ``until`` takes.

        A ``GlobalOrder`` joins its epochs: the step that crosses the end of one ends the pass, and the next pass goes
        on where it stopped. Any other loader gives micro-batches of this rank; its pass ends with a shorter step where
        the last micro-batches do not fill one, on all ranks at once. After a pass its ``DistributedSampler``, if it has
        one, is set to the next epoch; an epoch that you set before a pass stands.

        Args:
            loader: a ``GlobalOrder``, or any iterable of micro-batches.
            until: train until so much is consumed, counted from the beginning of the run.
            count: examples in a micro-batch of a loader that is not a ``GlobalOrder``. By default what all entries of
                the micro-batch agree on; every one but the last of a pass must then hold ``micro_batch_size``.
            weigh: the number of terms that the mean loss of a micro-batch is taken over, where that is not its
                examples: tokens that are not padding, say. The gradient of a step is then the mean over the terms of
                all its micro-batches, on all ranks. One of weight 0 counts for nothing, its loss is not read, and where
                nobody waits for it the loop may pass it over; a step of nothing else is left out. Batch sizes, noise
                and noise scale stay in examples, of the step's average number of terms. The micro-batches of a step are
                fetched before it begins.
            allow_same_data: ranks may be given the same examples, to the bit, by a loader that is not a
                ``GlobalOrder``; without it that is an error at the first step of a pass.

        Raises:
            ValueError: a data set smaller than the largest batch, an empty loader, a loader whose micro-batches are not
                of ``micro_batch_size`` (the last may be smaller) or do not say how many examples they hold, a
                micro-batch that should grow with a loader that cannot, negative weights, ranks that hold different
                orders, plans or settings, or ranks that hold the same examples.
            RuntimeError: a step whose micro-batches were not all run; two steps in a row whose update never came;
                parameters that joined or left those that train; or an object that a newer one has replaced.
            UpdatesLeftOut: ``max_left_out`` updates in a row were left out.
            TypeError: ``until`` without a unit, or a loader that is none.
        """
        self._check_in_place()
        self._missing.begin_loop()
        if until is not None:
            check_until(until, self.consumed)  # a unit that is not counted fails here, not at the end
        self._check_ranks(loader)
        passes = self._passes(loader, count, weigh, allow_same_data=allow_same_data)
        feed = self._trials.over(passes, self._planner, self._observers)
        while until is None or not self.consumed.reached(until):
            yield from self._one_step(feed)
            if passes.ended:
                passes.end_pass()
                if until is None:
                    return
        passes.end_pass()

    def _passes(
        self,
        loader: GlobalOrder | Iterable[Any],
        count: Callable[[Any], int],
        weigh: Callable[[Any], float] | None,
        *,
        allow_same_data: bool,
    ) -> Passes:
        if isinstance(loader, GlobalOrder):
            return OrderPasses(loader, self.collectives, weigh=weigh, largest=self._planner.largest_known())
        if self._grows_micro_batch:
            raise ValueError(
                f"max_micro_batch_size needs a GlobalOrder: a {type(loader).__name__} decides its micro-batch itself"
            )
        if count is num_examples_in:
            check_loader(loader, self.plan.micro_batch_size)
        may_be_empty, self._just_loaded = self._just_loaded, False
        return LoaderPasses(
            loader,
            self.collectives,
            count=count,
            weigh=weigh,
            may_be_empty=may_be_empty,
            allow_same_data=allow_same_data,
        )

    def _one_step(self, feed: Feed) -> Iterator[Step]:
        """One step from ``feed``, or nothing where its pass is over."""
        self._check_in_place()
        self._flush()
        number = self.consumed.steps
        self._updates_in_a_row.check(number, self.progress.steps)
        self._observers.before(number)
        self._observers.at(Phase.LOADING, Moment(number, self.plan))
        portion = feed.take(self.plan)
        if portion is None:
            return
        self._tell_engine()
        self._groups = self._optimizer.param_groups  # an engine may show only some of them while it steps
        probe = self._probe if self._planner.measures_next and self._engine.measures_next() else None
        step = Step(
            self.plan,
            portion,
            number=number,
            engine=self._engine,
            probe=probe,
            empty_parts=self._empty_parts,
            votes=self._votes,
            find_nonfinite=self._find_nonfinite,
            riders=self._stopwatches,
            observers=self._observers,
            check_trained=self._check_trained,
            finish=partial(self._finish, feed=feed),
        )
        self._step = step
        self._running = True
        try:
            yield step
        except BaseException:  # the loop was broken off, by `break` among others, and this generator dropped
            if probe is not None and step.decision is None and not step.waits:
                probe.stop()
            self._begun = None
            raise
        finally:
            self._hooks.restore()
            self._running = False
        left_out = step.waits
        if left_out:
            self._settle_left_out(step)
        if step.decision is None:
            raise RuntimeError(
                "the step's micro-batches were not all run: finish `for batch in step` before the next step, and do "
                "not break out of it"
            )
        if not left_out and not self._engine.left_out():
            self._count_missing()

    def _check_in_place(self) -> None:
        if self._gone is not None:
            raise RuntimeError(
                f"this AdaptiveBatch was {self._gone}, and cannot run any more steps; its state_dict() can be loaded "
                f"into a new one"
            )

    def _check_trained(self) -> None:
        """Before the first backward of a step, where all is frozen and thawed that will be."""
        if self._trained is not None:
            self._trained.check("AdaptiveBatch")

    def _count_missing(self) -> None:
        """After a step: whether its update came, or was left out by somebody who may."""
        update = self._update
        if update is None:
            self._missing.came()
        elif not (update.left_out or update.empty or not update.finite or (self._scaled and not update.looked_at)):
            self._missing.missed(self._hooks.missing)

    def _settle_left_out(self, step: Step) -> None:
        """The end of a step whose gradient an engine found not finite, so that it never stepped the optimizer."""
        if not self._engine.left_out():
            raise RuntimeError("the step's update never came: call engine.step() after `for batch in step`")
        step.settle(reduced=False)

    def _finish(self, step: Step, *, feed: Feed) -> None:
        """The end of the inner loop: decide, and keep what the update will need."""
        portion, before = step.portion, self.consumed
        self._step = None
        feed.consumed(portion)
        # What was timed comes in with what was measured.
        timed = next((watch.timed for watch in self._stopwatches if step.measured), None)
        ended = self._planner.end_step(
            Measured(portion.num_examples, step.moments, step.finite, step.empty, step.loss, timed)
        )
        if step.empty:
            _log.warning("step %d is left out: none of its micro-batches weighs anything", before.steps)
        step.decision = ended.decision
        entry = line(
            plan=step.plan,
            num_examples=portion.num_examples,
            before=before,
            loss=step.loss,
            moments=step.moments,
            averages=self._planner.state.averages,
            decision=ended.decision,
            seconds=None if timed is None else timed[1],
        )
        entry |= self._trials.journal_entry()
        if floors := ended.scaling.binding_floors(self._groups):
            entry["beta_floors"] = floors
        self._update = _Update(
            before.steps,
            portion.num_examples,
            ended.scaling,
            ended.gain,
            step.finite,
            looked_at=step.probed or self._find_nonfinite is not None,
            empty=step.empty,
            entry=entry,
        )
        self._observers.at(Phase.BETWEEN, Moment(before.steps, step.plan))

    # --- around optimizer.step() ------------------------------------------------------------------------------------

    def _moved(self) -> StepOverrides:
        """What the batch changes about the update that is about to run, if the optimizer itself finds it in order."""
        check_before_step(self._optimizer)
        update = self._update or self._begun
        if update is None:  # of a loop without us, whose batch is none of ours
            return StepOverrides(1.0)
        return StepOverrides(update.scaling.factor, update.scaling.settings, update.scaling.averaged)

    def _skips_update(self) -> bool:
        """Whether to leave out the update that is about to run."""
        if self._step is not None and self._step.waits:  # for its gradient to be reduced
            self._step.settle()
        update = self._update or self._begun
        if update is None:
            return False
        return update.left_out or update.empty or (self._skip_nonfinite and not update.finite)

    def _update_done(self, optimizer: Optimizer, rates: list[float], applied: bool) -> None:
        update, self._update = self._update, None
        if update is None:
            self._missing.strange()
            return
        self._begun = update if self._running else None
        if applied:
            self._planner.applied(update.num_examples, update.gain)
        self._tell_engine()
        stored = [host_value(group.get("lr")) for group in self._groups]
        base = [host_value(group.get("initial_lr", group.get("lr"))) for group in self._groups]
        shape = [lr / b if b else math.nan for lr, b in zip(stored, base, strict=True)]
        if len(rates) < len(stored):
            rates = [lr * update.scaling.factor for lr in stored]
        lr = {"base": base, "shape": shape, "factor": update.scaling.factor, "applied": rates}
        self._journal.write({**update.entry, "lr": lr, "applied": applied, **self._engine.journal_entry()})
        self._observers.after(update.number)

    def leave_out(self) -> None:
        """Leaves out the update of the step whose micro-batches have just been run; call it on all ranks.

        As with gradients that are not finite, the step consumes its data and moves nothing else. A call of
        ``optimizer.step()`` for it has no effect, and may be left out as well.

        Raises:
            RuntimeError: the micro-batches are not all run, or the update has come already.
        """
        if self._update is None:
            raise RuntimeError("leave_out belongs after `for batch in step`, and before optimizer.step()")
        self._update.left_out = True

    def _flush(self) -> None:
        """Writes down a step whose update never came (a gradient scaler left it out, or it raised)."""
        self._hooks.forget()
        if self._update is not None:
            self._journal.write({**self._update.entry, "lr": None, "applied": False})
            self._observers.after(self._update.number)
        self._update = self._begun = self._step = None

    def _tell_engine(self) -> None:
        self._engine.stands_at(self.progress, self.lr_factor)

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The next plan, the control's memory and the progress: plain numbers, equal on all ranks.

        Taken between steps, after ``optimizer.step()``, it belongs to the next step: a resumed run repeats nothing.
        """
        return {**self._planner.state_dict(), "trials": self._trials.state_dict()}

    def settle(self, *, scaled: bool = False) -> None:
        """Before the state is taken for a checkpoint: makes sure that nothing of a step is still to come.

        Args:
            scaled: a gradient scaler is in use, which may have left the update out.

        Raises:
            RuntimeError: a step's micro-batches, or its ``optimizer.step()``, are still to be run.
        """
        if self._step is not None and self._step.waits and self._engine.left_out():
            self._settle_left_out(self._step)
            scaled = True
        scaled = scaled or (self._update is not None and self._update.left_out)
        if self._step is not None or (self._update is not None and not scaled):
            left = "`for batch in step`" if self._step is not None else "optimizer.step()"
            raise RuntimeError(
                f"a checkpoint belongs between two steps, and {left} has not been run to its end: save after "
                f"optimizer.step(), and give save your GradScaler, if you have one"
            )
        self._flush()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a run, also one with other ranks, micro-batches or limits: the batch size stays as near as it can.

        Raises:
            ValueError: a state of a newer format, or of another reference batch size than this run was given.
        """
        check_format(state)
        self._planner.check_reference(state["reference_batch_size"])
        self._trials.load_state_dict(state.get("trials"))
        self._planner.load_state_dict(state, self._trials.sizes)
        self._update = None
        self._just_loaded = True
        self._tell_engine()

    def remove(self) -> None:
        """Takes every hook off model and optimizer; the object is not usable afterwards."""
        self._flush()
        self._hooks.remove()
        if self._probe is not None:
            self._probe.remove()
        self._gone = self._gone or "removed by remove()"

    def give_way(self) -> None:
        """A newer one is made on this optimizer, or for its parameters: takes every hook off.

        A probe that was given stays as it is, as the newer one may have been given it too.
        """
        with suppress(OSError):  # of a journal whose folder is gone; nobody waits for its last line
            self._flush()
        self._hooks.remove()
        if self._probe is not None and self._owns_probe:
            self._probe.remove()
        elif self._probe is not None:
            self._probe.stop()
        self._gone = f"replaced by a newer one on the same {kind_of(self._optimizer)} or its parameters"

    def check_reference(self, saved: int) -> None:
        """As ``load_state_dict`` checks the reference batch size, before anything else is loaded."""
        self._planner.check_reference(saved)

    def _check_ranks(self, loader: object) -> None:
        """Ranks that would go separate ways raise together, rather than wait for each other."""
        place = loader.state_dict() if isinstance(loader, GlobalOrder) else None
        gives = None if self._probe is None else self._probe.gives
        mine = (place, self._planner.given(), gives, self._votes.listening, self._trials.state_dict())
        if not self.collectives.agree(mine):
            raise ValueError(
                f"the ranks hold different data orders, batch plans or settings (this one: data {place}, {self.plan}, "
                f"{self.consumed}): give all the same data set, seed, arguments and saved state"
            )
