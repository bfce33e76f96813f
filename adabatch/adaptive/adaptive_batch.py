"""``AdaptiveBatch``: the one stateful object, which joins pure decisions and torch code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from adabatch.adaptive.late import check_late
from adabatch.adaptive.loop import StepLoop
from adabatch.adaptive.options import EngineOptions, Guard, JournalOption, Measure
from adabatch.adaptive.planning import check_format
from adabatch.adaptive.step import Step
from adabatch.adaptive.validation import (
    check_types,
    enabled_scaler,
    engine_of,
    given_settings,
    prepared,
    suited_probe,
)
from adabatch.arguments import checked
from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import BatchPlan, Duration, Progress
from adabatch.guards.drift import check_interval
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.rank_places import RankPlaces
from adabatch.guards.same_settings import failing_together
from adabatch.guards.votes import Votes
from adabatch.journal.writer import Journal
from adabatch.lr.follow import Followers
from adabatch.lr.rules import LRRule, Setting
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import GlobalOrder, WholeSteps, num_examples_in
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.optimizers.joined import each_of, joined, kind_of
from adabatch.runtime.optimizers.ownership import displace, release, take_over, undone_on_error
from adabatch.runtime.optimizers.scheduler import WritesRates
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.side_channel import side_channel_of_run
from adabatch.runtime.wrappers.fabric import inside_fabric

_log = logging.getLogger("adabatch")


class AdaptiveBatch:
    """Lets the global batch size follow a criterion, and the learning rate follow the batch, around your own loop.

        limits = Limits(min=64, max=4096)
        batches = AdaptiveBatch(model, optimizer, StepPrice(256), micro_batch_size=16, limits=limits)
        for step in batches.steps(loader):
            for x, y in step:
                step.backward(loss_fn(model(x), y))
            optimizer.step(); optimizer.zero_grad()

    Args:
        model: plain, wrapped in ``DistributedDataParallel``, or sharded by ``fully_shard`` (FSDP2; torch 2.9 for a
            criterion that needs a probe); model and optimizer also as Lightning's ``fabric.setup`` returned them.
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
            is "gain" if the batch follows Euclidean noise, "sqrt" for ``KFAC`` and ``Shampoo`` (no rule has been
            derived for them; arXiv 2602.03001 uses this one), "sqrt" ("linear" for ``SGD``) with a ``Seesaw`` schedule,
            whose decay of the learning rate comes on top of it, and "none" otherwise, as for all other schedules. The
            default was chosen in ``benchmarks/frontier.py``.
        follow: what else follows the batch during an update: "betas", "eps", "weight_decay" (decoupled). The
            optimizer's memory and decay per example then stay what they are at the reference batch size. With "betas",
            the optimizer counts its steps in updates of that size, so that its bias correction stays right. The betas
            do not fall below floors (0.5 and 0.95), which ``lr.Followers`` changes. The default is ``("betas",)`` if
            ``lr_rule`` is left out, is "gain" by default, and the optimizer is torch's ``Adam`` or ``AdamW``; it is
            ``()`` otherwise.
        reference_batch_size: the global batch size that the base LR was tuned for; by default the first of the run.
        tokens_per_example: needed for durations in tokens.
        probe: how gradients are measured; by default chosen by the engine.
        local_sgd: the ``LocalSGD`` of this model and optimizer, which averages the workers every few steps. A plain
            model on several processes needs it. Gradients are measured once per round.
        journal: where the first rank writes one JSON line per step: a path, or a tracker
            (``adabatch.integrations.trackers``), or a list of trackers with at most one path.
        measure: what is measured in addition to what the criterion needs: noise, norms, layers.
        guard: what is checked and tried: updates that are not finite, larger micro-batches, ranks that drift.
        engine: options of the engine that the model's type selects, such as a gradient scaler; or, for hosts, an
            engine.

    Raises:
        ValueError: if the ranks or the micro-batch cannot form the limits, if the criterion needs more than the
            probe gives, if the model has no trainable parameters or the optimizer belongs to another model, if the rule
            is unknown, if a size is below 1, or if a trial is asked for on an engine whose ranks cannot run alone, or
            of a micro-batch that does not grow.
        TypeError: if the model, the optimizer, the criterion, its needs, the scaler or a group of options is of another
            type.
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
        follow: Followers | Collection[Setting] | None = None,
        reference_batch_size: int | None = None,
        tokens_per_example: int | None = None,
        probe: Probe | None = None,
        local_sgd: LocalSGD | None = None,
        journal: JournalOption = None,
        measure: Measure = Measure(),
        guard: Guard = Guard(),
        engine: EngineOptions | Engine = EngineOptions(),
    ) -> None:
        optimizer = joined(optimizer)
        check_types(
            model, optimizer, criterion, control, probe=probe, local_sgd=local_sgd, measure=measure, guard=guard
        )
        fabric = inside_fabric(model)
        model, backward = (model, None) if fabric is None else fabric
        # The engine comes first: with its collectives a rank tells the others of an error in what follows.
        self._engine = engine_of(model, optimizer, engine, local_sgd, backward)
        # Before anything may fail on one rank only: the ranks count their runs.
        channel = side_channel_of_run(self.collectives)
        self._scaler = enabled_scaler(engine)
        with undone_on_error() as undo, failing_together(self.collectives, "AdaptiveBatch(...)"):
            self._planner, needs, layers = prepared(
                model,
                optimizer,
                criterion,
                self._engine,
                micro_batch_size=micro_batch_size,
                max_micro_batch_size=max_micro_batch_size,
                limits=limits,
                control=control,
                lr_rule=lr_rule,
                follow=follow,
                reference_batch_size=reference_batch_size,
                tokens_per_example=tokens_per_example,
                measure=measure,
                probe=probe,
            )
            self._optimizer = optimizer
            self._owns_probe = probe is None
            # one writer: all ranks would write the same lines
            self._journal = Journal(journal if self.collectives.rank == 0 else None)
            check_every = check_interval(guard.check_every, self._engine)
            check_late(optimizer, criterion, self._engine, local_sgd, measure=measure, guard=guard)
            self._engine.stands_at(self.progress, self.consumed, self._planner.lr_factor)

            # Last, so that a constructor that raises leaves no hook behind. A predecessor goes first: some hooks can be
            # set once only, and its removal would take off those of the new probe.
            held = [p for group in optimizer.param_groups for p in group["params"]]
            take_over(self, [*each_of(optimizer), *held], kind="AdaptiveBatch")
            undo.callback(release, self)  # nobody may ask a half-built object to give way
            self._probe = suited_probe(optimizer, needs, given=probe, engine=self._engine, layers=layers)
            if probe is None and self._probe is not None:
                undo.callback(self._probe.remove)
            self._loop = StepLoop(
                model,
                optimizer,
                engine=self._engine,
                channel=channel,
                planner=self._planner,
                journal=self._journal,
                probe=self._probe,
                given_probe=probe is not None,
                measures_late=measure.late,
                guard=guard,
                check_every=check_every,
                grows_micro_batch=max_micro_batch_size is not None,
                given=given_settings(self._engine, engine, local_sgd, measure, guard),
            )
            # another rank may fail, and then this one raises at the end of the block
            undo.callback(self._loop.updates.remove, "not made")
        if displace([*each_of(optimizer), *held], kind="monitor"):
            _log.warning(
                "the monitor() of this %s is removed, since the AdaptiveBatch measures the same gradients: read its "
                "noise_scale and its journal (for a criterion that measures nothing, give Measure(monitor=True))",
                kind_of(optimizer),
            )

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
        return self._loop.updates.lr_factor

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose steps are the updates, without the wrapper of a host; several of them joined."""
        return self._optimizer

    @property
    def scaler(self) -> GradScaler | None:
        """The gradient scaler that it was given, if it is enabled."""
        return self._scaler

    @property
    def order(self) -> GlobalOrder | None:
        """The ``GlobalOrder`` that ``steps()`` read last; None if there is none."""
        return self._loop.order

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
        return self._loop.trials.too_large

    @property
    def heartbeat(self) -> Heartbeat:
        """What this rank is doing now; read by a ``Watchdog``."""
        return self._loop.heartbeat

    @property
    def places(self) -> RankPlaces | None:
        """Where the other ranks stand, for a call that all must make; None if there are none, or they cannot tell."""
        return self._loop.places

    @property
    def votes(self) -> Votes:
        """The ranks' votes on whether to stop or save after this step; see ``Preemption`` and ``Checkpoints``."""
        return self._loop.votes

    @checked
    def hold_growth_until(self, duration: Duration | None) -> None:
        """Keeps the batch from growing before ``duration`` has passed, unless ``Control(hold_until=)`` says otherwise.

        A ``ProgressLR`` with a warm-up calls this. Noise and signal of the first steps are seldom those of the rest of
        the run, and a batch that grows during the warm-up shortens it in steps.

        Raises:
            ValueError: if the run does not count the unit of ``duration``.
        """
        if duration is not None:
            # raises if the unit is not counted: here, and not at the first decision
            self.progress.count(duration.unit)
        self._planner.hold_until = duration

    def add_schedule(self, schedule: WritesRates) -> None:
        """Tells a schedule of each update, and of each state that is loaded, until the schedule is dropped.

        ``ProgressLR`` calls it.

        Raises:
            RuntimeError: if this object was removed or replaced.
            ValueError: if the schedule writes the rates of another optimizer of the same parameters.
        """
        self._loop.check_open()
        self._loop.updates.add_schedule(schedule)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def steps(
        self,
        loader: GlobalOrder | WholeSteps | Iterable[Any],
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
            loader: a ``GlobalOrder``, or any iterable of micro-batches; or ``WholeSteps``, whose items are the
                micro-batches of a step, whatever the plan is.
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
            allow_same_data: whether a loader that is not a ``GlobalOrder`` may give the same examples to several ranks,
                or a stream in several loading processes. By default that is an error at the first step of a pass.

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
        passes = self._loop.begin(loader, until=until, count=count, weigh=weigh, allow_same_data=allow_same_data)
        if until is not None and self.consumed.reached(until):
            self._loop.warn_of_nothing_left(until)
        while until is None or not self.consumed.reached(until):
            yield from self._loop.one_step(passes)
            if passes.ended:
                passes.end_pass()
                if until is None:
                    break
        else:
            # `until` may be reached in the middle of a pass
            passes.end_pass()
        self._loop.end()

    def leave_out(self) -> None:
        """Leaves out the update of the step whose micro-batches have just been run. Call it on all ranks.

        As with gradients that are not finite, the step consumes its data and changes nothing else. Calling
        ``optimizer.step()`` for it has no effect, and is optional; its gradients are dropped.

        Raises:
            RuntimeError: if not all micro-batches were run, or if the update has already come.
        """
        self._loop.updates.leave_out()

    def record_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Writes numbers of an evaluation, such as ``{"loss": 0.31, "accuracy": 0.92}``, into the journal.

        Call it between steps, after ``optimizer.step()``. ``adabatch report`` draws them, and trackers get them as
        ``evaluation/loss`` and so on. The first rank writes its numbers; what other ranks give is checked and dropped,
        so average over the ranks before. Nothing else depends on them.

        Args:
            metrics: numbers by name; also tensors and arrays of one element.

        Raises:
            ValueError: if there are no numbers, or a name is empty.
            TypeError: if a name is not a string, or a value is not a number.
            RuntimeError: if micro-batches of a step, or its ``optimizer.step()``, are still to be run.
        """
        self._loop.updates.settle_for_evaluation()
        self._journal.record_evaluation(metrics, after=self.consumed)
        for watch in self._loop.stopwatches:
            watch.interrupted()

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The next plan, the control's averages and the progress: plain numbers, equal on all ranks.

        Call it between steps, after ``optimizer.step()``. The state is that of the next step, so that a resumed run
        repeats nothing.
        """
        late = {} if self._loop.late is None else {"late": self._loop.late.state_dict()}
        return {**self._planner.state_dict(), "trials": self._loop.trials.state_dict(), **late}

    def settle(self, *, scaled: bool = False) -> None:
        """Makes sure that no step is unfinished, before the state is taken for a checkpoint.

        Args:
            scaled: whether a gradient scaler is in use, which may have left the update out.

        Raises:
            RuntimeError: if micro-batches of a step, or its ``optimizer.step()``, are still to be run.
        """
        self._loop.updates.settle(scaled=scaled)

    def __getstate__(self) -> Any:
        raise TypeError(
            "an AdaptiveBatch cannot be copied or pickled, since it has hooks on a model and an optimizer: save its "
            "state_dict() (adabatch.save and Checkpoints do), and load it into a new one. A copy of the model needs "
            "an AdaptiveBatch and an optimizer of its own"
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a run. If ranks, micro-batches or limits have changed, the nearest possible batch size is used.

        Raises:
            ValueError: if the state has a newer format, or another reference batch size than this run was given.
            RuntimeError: inside a step.
        """
        check_format(state)
        self.check_not_inside("a load")
        self._planner.check_reference(state["reference_batch_size"])
        # Everything that may fail on a foreign state is checked above, before any part of this one is overwritten.
        self._loop.trials.load_state_dict(state.get("trials"))
        self._planner.load_state_dict(state, self._loop.trials.sizes)
        if self._loop.late is not None:  # without it the numbers of the saved run's last step are dropped
            self._loop.late.load_state_dict(state.get("late"))
            self._planner.probe_waits = self._loop.late.waiting
        self._loop.heartbeat.loaded()
        # a loader that was loaded with the run may have nothing left of its pass, which is no error then
        self._loop.just_loaded = True
        self._loop.updates.drop()

    def check_not_inside(self, what: str) -> None:
        """Checks that this is no place inside a step, for ``what`` belongs between two of them; see ``Checkpoints``.

        Raises:
            RuntimeError: if it is.
        """
        self._loop.updates.check_not_inside(what)

    def remove(self) -> None:
        """Removes every hook from the model and the optimizer. The object cannot be used afterwards."""
        release(self)
        self._loop.updates.flush()
        self._loop.close("removed by remove()")
        self._journal.close()
        if self._probe is not None:
            self._probe.remove()

    def give_way(self) -> None:
        """Removes every hook, since a newer object is made for the same optimizer or parameters.

        A probe that the user gave is kept, since the newer object may use it too.
        """
        newer = f"replaced by a newer one on the same {kind_of(self._optimizer)} or its parameters"
        with suppress(OSError):  # the journal's folder may be gone
            self._loop.updates.flush()
        with suppress(OSError):  # of a last line; the hooks are off by then
            self._loop.close(newer)
        if self._probe is not None and self._owns_probe:
            self._probe.remove()
        elif self._probe is not None:
            self._probe.stop()

    def check_reference(self, saved: int) -> None:
        """Checks the reference batch size of a saved run, before anything is loaded."""
        self._planner.check_reference(saved)
