"""``AdaptiveBatch``: the one stateful object, which joins pure decisions and torch code."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import BatchPlan, Duration, Progress, micro_batch_sizes
from adabatch.guards.drift import DriftCheck, check_interval
from adabatch.guards.finite import nonfinite_in
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.left_out import UpdatesInARow
from adabatch.guards.loop_mistakes import LoopMistakes
from adabatch.guards.memory_trials import Trials
from adabatch.guards.missing_updates import MissingUpdates
from adabatch.guards.same_settings import (
    check_same_settings,
    failing_together,
    optimizer_settings,
    scaler_settings,
    versions,
)
from adabatch.guards.votes import Votes
from adabatch.journal import Journal, JournalTarget, line
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
from adabatch.runtime.optimizers import each_of, joined, kind_of, weight_versions
from adabatch.runtime.ownership import take_over
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.step_hooks import StepHooks, StepOverrides, host_value
from adabatch.runtime.stopwatch import Stopwatch
from adabatch.runtime.trained_parameters import TrainedParameters
from adabatch.step import Step
from adabatch.validation import (
    check_before_step,
    check_types,
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
    """What is kept between the end of a step's inner loop and its ``optimizer.step()``."""

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
    """Lets the global batch size follow a criterion, and the learning rate follow the batch, around your own loop.

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
        optimizer: each ``step()`` counts as an update, and runs with the batch factor on the learning rates. Only
            gradients of the parameters that it holds are measured. A list of several optimizers with different
            parameters makes one update: it is complete when all have stepped, in any order; all step with the same
            factor, or leave a step out together. An optimizer has one ``AdaptiveBatch``. A new one on the same
            optimizer, or on another optimizer of the same parameters, replaces the older one, whose ``steps()`` raises
            from then on.
        criterion: which batch size to ask for; a ``Schedule`` needs no probe.
        micro_batch_size: examples in one forward and backward on one rank, as your loader yields them. If its
            micro-batches vary in size, this is the largest, and ``steps(count=)`` must count them.
        limits: smallest and largest global batch size; the run starts at the smallest. Optional with a schedule.
        max_micro_batch_size: with a ``GlobalOrder``, how far the micro-batch may grow (by doubling) before steps
            accumulate; by default it does not grow.
        control: how cautiously the criterion is followed; by default the batch grows and shrinks, and waits for the
            end of the schedule's warm-up before it grows.
        lr_rule: how the learning rate follows the batch: "none", "linear", "sqrt", "gain" or "sqrt_gain". The default
            is "sqrt" for ``KFAC`` and ``Shampoo`` (no rule has been derived for them; arXiv 2602.03001 uses this one),
            "sqrt" ("linear" for ``SGD``) with a ``Seesaw`` schedule, whose decay of the learning rate comes on top of
            it, and "none" otherwise.
        follow: what else follows the batch during an update: "betas", "eps", "weight_decay" (decoupled). The
            optimizer's memory and decay per example then stay what they are at the reference batch size. With "betas",
            the optimizer counts its steps in updates of that size, so that its bias correction stays right. The betas
            do not fall below floors (0.5 and 0.95), which ``lr.Followers`` changes.
        reference_batch_size: the global batch size that the base LR was tuned for; by default the first of the run.
        tokens_per_example: needed for durations in tokens.
        probe: how gradients are measured; by default chosen by the engine.
        local_sgd: the ``LocalSGD`` of this model and optimizer, which averages the workers every few steps. A plain
            model on several processes needs it. Gradients are measured once per round.
        journal: where the first rank writes one JSON line per step: a path, or a tracker
            (``adabatch.integrations.trackers``), or a list of trackers with one path at most.
        measure: what is measured in addition to what the criterion needs: noise, norms, layers.
        guard: what is checked and tried: updates that are not finite, larger micro-batches, ranks that drift.
        engine: options of the engine that the model's type selects, such as a gradient scaler; or, for hosts, an
            engine.

    Raises:
        ValueError: if the ranks or the micro-batch cannot make up the limits, if the criterion needs more than the
            probe gives, if the model has no trainable parameters or the optimizer belongs to another model, if the rule
            is unknown, if a size is below 1, or if a trial is asked for on an engine whose ranks cannot run alone, or
            of a micro-batch that does not grow.
        TypeError: if the optimizer, the criterion, its needs or the scaler is of another type.
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
        journal: JournalTarget | Sequence[JournalTarget] | None = None,
        measure: Measure = Measure(),
        guard: Guard = Guard(),
        engine: EngineOptions | Engine = EngineOptions(),
    ) -> None:
        optimizer = joined(optimizer)
        check_types(optimizer, criterion)
        self._engine = engine_of(model, optimizer, engine, local_sgd)
        with failing_together(self._engine.collectives, "AdaptiveBatch(...)"):
            rules = checked_rules(
                model,
                optimizer,
                criterion,
                lr_rule=lr_rule,
                follow=follow,
                reference_batch_size=reference_batch_size,
                tokens_per_example=tokens_per_example,
            )
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
            # The one that the optimizer last ran, for an engine that runs it in pieces.
            self._begun: _Update | None = None
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
            self._versions: list[int] = []  # of the weights, at the end of a step's inner loop
            self._mistakes = LoopMistakes(self._engine, optimizer)
            self._empty_parts = EmptyParts(model)
            self._journal = Journal(journal if self.collectives.rank == 0 else None)
            self._votes = Votes(self.collectives)
            self._given = {  # what the ranks compare, beside what the planner was given
                **versions(),
                "engine": type(self._engine),
                "gradient_sync": engine.gradient_sync if isinstance(engine, EngineOptions) else None,
                "scaler": scaler_settings(engine.scaler) if isinstance(engine, EngineOptions) else None,
                "local_sgd": local_sgd is not None,  # which compares its own settings
                "measure": measure,
                "guard": replace(guard, trial=None),
                "trial=": guard.trial is not None,
            }
            self._heartbeat = Heartbeat()
            self._stopwatches = [Stopwatch(self.collectives.size)] * criterion.needs.seconds
            self._observers = Observers(self._heartbeat, *self._stopwatches)
            every = check_interval(guard.check_every, self._engine)
            if every is not None:
                check = DriftCheck(self._engine, optimizer, self._planner, every=every, observers=self._observers)
                self._observers.add(check)
            self._tell_engine()

            # Last, so that a constructor that raises leaves no hook behind. A predecessor goes first: some hooks can be
            # set once only, and its removal would take off those of the new probe.
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
        """What all steps consumed so far, including those whose update was left out."""
        return self._planner.consumed

    @property
    def progress_after_next(self) -> Progress:
        """What the applied updates will have consumed when the next planned step is applied."""
        return self._planner.after_next()

    @property
    def noise_scale(self) -> float:
        """Averaged noise over averaged signal, in examples; NaN until it has been measured."""
        return self._planner.state.averages.noise_scale

    @property
    def lr_factor(self) -> float:
        """The batch factor that the next ``optimizer.step()`` applies."""
        if self._update is not None:
            return self._update.scaling.factor
        return self._planner.scaling(self.plan.global_batch_size).factor

    @property
    def journal(self) -> Journal:
        """The journal of the run; its ``path`` is None on all ranks but the first."""
        return self._journal

    @property
    def collectives(self) -> Collectives:
        """The ranks of the run."""
        return self._engine.collectives

    @property
    def too_large(self) -> int | None:
        """The smallest micro-batch size that ran out of memory in its trial; None if none did."""
        return self._trials.too_large

    @property
    def heartbeat(self) -> Heartbeat:
        """What this rank is doing now; read by a ``Watchdog``."""
        return self._heartbeat

    @property
    def votes(self) -> Votes:
        """The ranks' votes on whether to stop or save after this step; see ``Preemption`` and ``Checkpoints``."""
        return self._votes

    def hold_growth_until(self, duration: Duration | None) -> None:
        """Keeps the batch from growing before ``duration`` has passed, unless ``Control(hold_until=)`` says otherwise.

        A ``ProgressLR`` with a warm-up calls this. Noise and signal of the first steps are seldom those of the rest of
        the run, and a batch that grows during the warm-up shortens it in steps.

        Raises:
            ValueError: if the run does not count the unit of ``duration``.
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
        """The steps of one pass over the data, or of as many passes as ``until`` takes.

        A ``GlobalOrder`` joins its epochs: the step that crosses the end of an epoch ends the pass, and the next pass
        continues where it stopped. Any other loader yields micro-batches of this rank. If its last micro-batches do not
        fill a step, the pass ends with a shorter step, on all ranks at once. After a pass, its ``DistributedSampler``,
        if it has one, is set to the next epoch; an epoch that you set yourself before a pass is kept.

        Args:
            loader: a ``GlobalOrder``, or any iterable of micro-batches.
            until: train until this much has been consumed, counted from the beginning of the run.
            count: returns the number of examples in a micro-batch of a loader that is not a ``GlobalOrder``. By
                default, this is the size on which all entries of the micro-batch agree, and every micro-batch but the
                last of a pass must hold ``micro_batch_size`` examples.
            weigh: returns the number of terms over which the mean loss of a micro-batch is taken, if that is not its
                number of examples; for instance, its tokens without padding. The gradient of a step is then the mean
                over the terms of all its micro-batches, on all ranks. A micro-batch of weight 0 counts for nothing: its
                loss is not read, and the loop may skip it if no other rank waits for it. A step that holds nothing else
                is left out. Batch sizes, noise and noise scale are still in examples, each of the step's average number
                of terms. The micro-batches of a step are fetched before it begins.
            allow_same_data: whether a loader that is not a ``GlobalOrder`` may give the same examples to several ranks.
                By default that is an error at the first step of a pass.

        Raises:
            ValueError: if the data set is smaller than the largest batch, if the loader is empty, if its micro-batches
                do not hold ``micro_batch_size`` examples (the last may hold fewer) or do not tell how many they hold,
                if the micro-batch should grow but the loader cannot let it, if a weight is negative, or if ranks hold
                different orders, plans or settings, or the same examples.
            RuntimeError: if not all micro-batches of a step were run, if the update of two steps in a row was made by
                another optimizer or by some of several only, if parameters joined or left those that train, or if a
                newer object has replaced this one.
            UpdatesLeftOut: if ``max_left_out`` updates in a row were left out.
            TypeError: if ``until`` has no unit, or ``loader`` is not an iterable of micro-batches.
        """
        self._check_in_place()
        self._missing.begin_loop()
        self._check_ranks(loader, until=until, count=count, weigh=weigh, allow_same_data=allow_same_data)
        with failing_together(self.collectives, "steps(...)"):
            if until is not None:
                check_until(until, self.consumed)  # a unit that is not counted fails here, not at the end
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
        """One step from ``feed``, or nothing if its pass is over."""
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
            mistakes=self._mistakes,
            finish=partial(self._finish, feed=feed),
        )
        self._step = step
        self._running = True
        try:
            yield step
        except BaseException:  # the loop was broken off, by `break` among others, and this generator dropped
            if probe is not None and step.decision is None and not step.waits:
                probe.stop()
            self._mistakes.forget()
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
                f"this AdaptiveBatch was {self._gone} and cannot run any more steps; its state_dict() can be loaded "
                f"into a new one"
            )

    def _check_trained(self) -> None:
        """Before the first backward of a step: by then the loop has frozen and thawed what it will."""
        if self._trained is not None:
            self._trained.check("AdaptiveBatch")

    def _count_missing(self) -> None:
        """After a step: whether its update came, or was rightly left out."""
        update = self._update
        if update is None:
            self._missing.came()
        elif not (update.left_out or update.empty or not update.finite or (self._scaled and not update.looked_at)):
            self._missing.missed(self._hooks.missing, moved=weight_versions(self._optimizer) != self._versions)

    def _settle_left_out(self, step: Step) -> None:
        """The end of a step whose optimizer the engine did not step, as the gradient was not finite."""
        if not self._engine.left_out():
            raise RuntimeError("the step's update never came: call engine.step() after `for batch in step`")
        step.settle(reduced=False)

    def _finish(self, step: Step, *, feed: Feed) -> None:
        """The end of the inner loop: decide, and keep what the update will need."""
        portion, before = step.portion, self.consumed
        self._step = None
        self._versions = weight_versions(self._optimizer)
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
        """What the batch changes about the update that is about to run."""
        check_before_step(self._optimizer)
        update = self._update or self._begun
        if update is None:  # an update outside of steps()
            return StepOverrides(1.0)
        return StepOverrides(update.scaling.factor, update.scaling.settings, update.scaling.averaged)

    def _skips_update(self) -> bool:
        """Whether to leave out the update that is about to run.

        Raises:
            RuntimeError: if the step's micro-batches are still to be run.
        """
        if self._step is not None and self._step.waits:  # until its gradient is reduced
            self._step.settle()
        elif self._step is not None and self._running:
            raise RuntimeError(
                f"optimizer.step() of the {kind_of(self._optimizer)} was called while the step's micro-batches were "
                f"being run: it belongs after `for batch in step`, once for each step, and so do zero_grad(), clipping "
                f"and the scheduler's step(). (If the loop over steps() is over, broken off by an error, call "
                f"remove() of the AdaptiveBatch first)"
            )
        update = self._update or self._begun
        return update is not None and self._leaves_out(update)

    def _leaves_out(self, update: _Update) -> bool:
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
        """Leaves out the update of the step whose micro-batches have just been run. Call it on all ranks.

        As with gradients that are not finite, the step consumes its data and changes nothing else. Calling
        ``optimizer.step()`` for it has no effect, and is optional; its gradients are dropped.

        Raises:
            RuntimeError: if not all micro-batches were run, or if the update has already come.
        """
        if self._update is None:
            raise RuntimeError("leave_out belongs after `for batch in step`, and before optimizer.step()")
        self._update.left_out = True

    def _flush(self) -> None:
        """Writes the line of a step whose update never came (a gradient scaler left it out, or it raised)."""
        self._hooks.forget()
        if self._update is not None:
            self._journal.write({**self._update.entry, "lr": None, "applied": False})
            self._observers.after(self._update.number)
            if self._engine.holds_gradients and self._leaves_out(self._update):  # the loop need not call step() then
                self._optimizer.zero_grad(set_to_none=True)
        self._update = self._begun = self._step = None

    def _tell_engine(self) -> None:
        self._engine.stands_at(self.progress, self.lr_factor)

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The next plan, the control's averages and the progress: plain numbers, equal on all ranks.

        Call it between steps, after ``optimizer.step()``. The state is that of the next step, so that a resumed run
        repeats nothing.
        """
        return {**self._planner.state_dict(), "trials": self._trials.state_dict()}

    def settle(self, *, scaled: bool = False) -> None:
        """Makes sure that no step is unfinished, before the state is taken for a checkpoint.

        Args:
            scaled: whether a gradient scaler is in use, which may have left the update out.

        Raises:
            RuntimeError: if micro-batches of a step, or its ``optimizer.step()``, are still to be run.
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
        """Restores a run. If ranks, micro-batches or limits have changed, the nearest possible batch size is used.

        Raises:
            ValueError: if the state has a newer format, or another reference batch size than this run was given.
        """
        check_format(state)
        self._planner.check_reference(state["reference_batch_size"])
        self._trials.load_state_dict(state.get("trials"))
        self._planner.load_state_dict(state, self._trials.sizes)
        self._update = None
        self._just_loaded = True
        self._tell_engine()

    def remove(self) -> None:
        """Removes every hook from the model and the optimizer. The object cannot be used afterwards."""
        self._flush()
        self._journal.close()
        self._hooks.remove()
        if self._probe is not None:
            self._probe.remove()
        self._gone = self._gone or "removed by remove()"

    def give_way(self) -> None:
        """Removes every hook, since a newer object is made for the same optimizer or parameters.

        A probe that the user gave is kept, since the newer object may use it too.
        """
        with suppress(OSError):  # the journal's folder may be gone
            self._flush()
        self._hooks.remove()
        if self._probe is not None and self._owns_probe:
            self._probe.remove()
        elif self._probe is not None:
            self._probe.stop()
        self._gone = f"replaced by a newer one on the same {kind_of(self._optimizer)} or its parameters"

    def check_reference(self, saved: int) -> None:
        """Checks the reference batch size of a saved run, before anything is loaded."""
        self._planner.check_reference(saved)

    def _check_ranks(
        self,
        loader: object,
        *,
        until: object,
        count: Callable[[Any], int],
        weigh: Callable[[Any], float] | None,
        allow_same_data: bool,
    ) -> None:
        """Raises on all ranks if some would take other steps; otherwise they would wait for each other."""
        if self.collectives.size == 1:
            return
        ordered = isinstance(loader, GlobalOrder)
        place = loader.state_dict() if isinstance(loader, GlobalOrder) else {}
        settings = {
            "loader": "a GlobalOrder" if ordered else "a loader of the rank's own",
            **{f"{name} of the data order": value for name, value in place.items()},
            "until": until,
            "count= of steps()": count is not num_examples_in,
            "weigh= of steps()": weigh is not None,
            "allow_same_data": allow_same_data,
            "what the probe gives": None if self._probe is None else self._probe.gives,
            "whether Preemption or Checkpoints listen": self._votes.listening,
            "sizes that ran out of memory": self._trials.state_dict(),
            **self._given,
            **self._planner.given(),
            **optimizer_settings(self._optimizer),
        }
        check_same_settings(self.collectives, settings)
