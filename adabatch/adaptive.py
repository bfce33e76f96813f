"""``AdaptiveBatch``: the one stateful object, where pure decisions and running torch meet."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from adabatch.batch.control import UNLIMITED, Control, ControlState, Limits, decide
from adabatch.batch.criteria import Criterion, DecaysLR, Observation
from adabatch.batch.needs import Needs
from adabatch.batch.plan import BatchPlan, Duration, Progress, micro_batch_sizes
from adabatch.batch.schedules import Schedule
from adabatch.guards.drift import check_same
from adabatch.guards.finite import SkipNonfinite, nonfinite_in
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.memory_trials import TrialLoss, Trials
from adabatch.guards.votes import Votes
from adabatch.journal import Journal, line
from adabatch.lr.follow import Followers, UpdateRules, UpdateScaling
from adabatch.lr.rules import NOISE_RULES, LRRule, Setting
from adabatch.optim.mup import check_ratios
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import EpochCounters, Feed, GlobalOrder, LoaderFeed, Portion, num_examples_in
from adabatch.runtime.data.loss_weights import LossWeightedFeed
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import Engine, GradientSync
from adabatch.runtime.local_sgd import LocalSGD
from adabatch.runtime.optimizers import each_of, joined, kind_of
from adabatch.runtime.ownership import take_over
from adabatch.runtime.probes.layers import PerLayer
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.step_hooks import StepHooks, StepOverrides, host_value
from adabatch.runtime.stopwatch import Stopwatch
from adabatch.runtime.trained_parameters import TrainedParameters
from adabatch.step import Step
from adabatch.validation import (
    check_fits,
    check_followers,
    check_rates,
    check_reduces,
    check_types,
    default_lr_rule,
    limits_and_grid,
    measured_layers,
    suited_probe,
    warn_of_linear,
    warn_without_room,
)

STATE_FORMAT = 2
"""Format 1 held averages of all probes; 2 holds the last probes one by one. Both are read."""

STRANGE_UPDATES = 3
"""Updates of a run whose ``steps()`` was never called, after which it says so."""


@dataclass
class _Update:
    """What waits between the end of a step's inner loop and its ``optimizer.step()``."""

    num_examples: int
    scaling: UpdateScaling
    gain: float | None
    finite: bool
    looked_at: bool  # whether loss and gradient were, so that `finite` is known
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
            micro-batches vary).
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
        monitor: measure noise and signal although neither criterion nor rule needs them.
        record_l1: write the l1 norm of each step's gradient to the journal, from which ``lr.refine`` makes a schedule
            for Adam, and the l2 norm, for SGD, which every run with a probe writes down. Of the gradient as the
            backward made it, reduced over the ranks and not clipped yet; one micro-batch a step is enough.
        per_layer: also write the noise and signal of each layer to the journal: of each "module" that holds parameters,
            or of each parameter "group" of the optimizer. For reading only; the criterion sees the whole gradient.
            A probe of your own takes ``layers=`` for it.
        layer_weights: how often the squared norm of each parameter's gradient counts in noise and signal, by name;
            ``plan.layer_weights()`` of a width plan, so that one ``eta`` means the same at every width. (The plain norm
            of a wide model is that of its readout: 97 % at width 4,096.)
        probe: how gradients are measured; by default chosen by the model's type.
        gradient_sync: at which micro-batches of a step the ranks reduce their gradients. DDP does it at the "last".
            FSDP2 by default at "each": between micro-batches a rank then holds its shard of the gradient only, and each
            micro-batch of each rank is a part. At the "last" a step sends one gradient instead of one a micro-batch, a
            rank holds the whole gradient meanwhile, and all micro-batches of a rank are one part: fewer parts, so a
            less certain estimate.
        scaler: the ``torch.amp.GradScaler`` of a run in float16. ``step.backward`` then scales the loss, and you call
            ``scaler.step(optimizer)`` and ``scaler.update()`` in the place of ``optimizer.step()``, and
            ``scaler.unscale_(optimizer)`` before you clip. Moments, losses and the journal are unscaled. A step that
            overflows consumes its data, and moves neither the progress of the learning rate nor the averages.
        local_sgd: the ``LocalSGD`` of this model and optimizer, which averages the workers now and then; a plain model
            on several processes needs it. Gradients are measured once a round.
        journal: where the first rank writes one JSON line a step.
        skip_nonfinite: leave out an update whose loss or gradient is not finite on some rank, on all ranks. A step
            without a probe pays for it with one pass over the gradient, 8 bytes and a host sync; "probed" looks at the
            other steps only, which pay nothing. Local steps of ``local_sgd`` without a probe are not looked at.
        trial: micro-batch -> its mean loss, as your loop computes it, autocast included; for a micro-batch that grows
            (``max_micro_batch_size``). The first one of each larger size is run for nothing before its step, once or,
            where steps accumulate, twice. Where a rank has no memory for it, all ranks stay with smaller ones and
            accumulate; the journal names it (``out_of_memory``). Not for models whose ranks gather shards from each
            other (FSDP2, DeepSpeed).
        check_every: steps from one check to the next that all ranks hold the same plan, and copies of weights the same
            bits: one pass over the weights, 24 bytes a rank and a host sync. None checks nothing.
        engine: how the model runs on several ranks; by default what its type says. For ``integrations``.

    Raises:
        ValueError: limits that the ranks or the micro-batch cannot carry out, a criterion that needs more than the
            probe gives, a model without trainable parameters or an optimizer of another model, an unknown rule, a
            size below 1, a trial of what no rank can try alone or of a micro-batch that does not grow, or a rule for
            the learning rate of an optimizer that sets it itself.
        TypeError: an optimizer, a criterion or a scaler that is none.
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
        monitor: bool = False,
        record_l1: bool = False,
        per_layer: PerLayer | None = None,
        layer_weights: Mapping[str, float] | None = None,
        probe: Probe | None = None,
        gradient_sync: GradientSync | None = None,
        scaler: GradScaler | None = None,
        local_sgd: LocalSGD | None = None,
        journal: str | Path | None = None,
        skip_nonfinite: SkipNonfinite = True,
        trial: TrialLoss | None = None,
        check_every: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        optimizer = joined(optimizer)
        check_types(optimizer, criterion)
        lr_rule = default_lr_rule(optimizer, criterion) if lr_rule is None else lr_rule
        followers = Followers.of(follow)
        decay = {"lr_decay": criterion.lr_decay} if isinstance(criterion, DecaysLR) else {}
        self._rules = UpdateRules(lr_rule, followers, **decay)
        check_followers(optimizer, followers.settings)
        check_rates(optimizer, lr_rule)
        warn_of_linear(lr_rule, criterion)
        for name, value in (
            ("reference_batch_size", reference_batch_size),
            ("tokens_per_example", tokens_per_example),
            ("check_every", check_every),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing can train")
        if engine is not None:
            self._engine = engine
        elif local_sgd is None:
            self._engine = engine_for(model, gradient_sync, scaler)
        else:
            self._engine = local_sgd.engine(model, optimizer, gradient_sync, scaler)
        self._collectives = self._engine.collectives
        if local_sgd is None:
            check_reduces(optimizer, self._collectives.size)
        self._criterion = criterion
        self._control = control or Control()
        self._tokens_per_example = tokens_per_example
        self._grows_micro_batch = max_micro_batch_size is not None
        if check_every is not None and not self._engine.copies:
            raise ValueError("check_every compares weights, and local_sgd lets those of workers differ: leave one out")
        self._check_every = check_every
        self._skip_nonfinite = bool(skip_nonfinite)
        # A scaler judges each of several optimizers alone, and would leave out a part of an update.
        self._scaled = scaler is not None and scaler.is_enabled()
        looks = skip_nonfinite is True or (self._scaled and len(each_of(optimizer)) > 1)
        self._find_nonfinite = nonfinite_in(optimizer) if looks else None

        needs = replace(criterion.needs, seconds=False) | Needs(
            l1=record_l1, layers=per_layer is not None or layer_weights is not None
        )
        timed = criterion.needs.seconds  # on the reduction of a measured step
        if timed or lr_rule in NOISE_RULES or monitor:
            needs = needs.with_noise()
        if layer_weights is not None and probe is not None:
            raise ValueError("layer_weights sorts the parameters into layers, for which a given probe is made already")
        layers, self._layer_weights = measured_layers(model, optimizer, needs, per_layer, layer_weights)
        # For recorded norms alone a probe measures no noise, and needs no parts to do so.
        in_noise = probe is not None or bool(replace(needs, l1=False))
        self._limits, self._grid = limits_and_grid(
            limits,
            criterion,
            dp_size=self._collectives.size,
            num_compared=self._engine.num_compared,
            micro_sizes=micro_batch_sizes(
                micro_batch_size, micro_batch_size if max_micro_batch_size is None else max_micro_batch_size
            ),
            in_parts=in_noise and not (probe is not None and probe.gives.examples),
        )
        tokens = None if tokens_per_example is None else 0
        self._progress = Progress(tokens=tokens, gain_steps=0.0 if in_noise else None)
        self._consumed = self._progress
        self._state = ControlState()
        self._hold_until: Duration | None = None
        self._plan = self._first_plan()
        self._reference = self._plan.global_batch_size if reference_batch_size is None else reference_batch_size
        self._reference_given = reference_batch_size is not None
        warn_without_room(optimizer, followers, self._limits.at(self._consumed)[1] / self._reference)
        self._step: Step | None = None  # the one under way, until it is decided
        self._update: _Update | None = None  # the one that its end prepared, until it is done
        self._begun: _Update | None = None  # the one that the optimizer last ran, for an engine that runs it in pieces
        self._model = model
        self._optimizer = optimizer
        self._groups = optimizer.param_groups
        self._running = False  # the loop stands inside a step
        self._begun_loops = False  # steps() has been called
        self._strange_updates = 0  # while it had not
        self._missed = 0  # steps in a row whose update never came
        self._gone: str | None = None  # why this object is not to be used any more
        self._owns_probe = probe is None
        self._just_loaded = False  # then a loader, loaded too, may stand behind its last micro-batch
        self._journal = Journal(journal if self._collectives.rank == 0 else None)
        self._votes = Votes(self._collectives)
        self._stopwatch = Stopwatch(self._collectives.size) if timed else None
        self._heartbeat = Heartbeat()
        self._tell_engine()

        # Last, so that a constructor that raises leaves no hook behind. A predecessor goes first: some hooks can be set
        # once only, and its removal would take off those of the new probe.
        held = [p for group in optimizer.param_groups for p in group["params"]]
        take_over(self, [*each_of(optimizer), *held], kind="AdaptiveBatch")
        given = None if probe is None else self._engine.fit_probe(probe)
        self._probe = suited_probe(model, optimizer, needs, given=given, engine=self._engine, layers=layers)
        try:
            sizes = self._grid.micro_sizes
            self._trials = None if trial is None else Trials(trial, self._engine, self._probe, sizes)
            everything = probe is not None or self._engine.reduced == "update"  # those hold other tensors
            measured = self._probe is not None or self._collectives.size > 1
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
        return self._plan

    @property
    def progress(self) -> Progress:
        """What the applied updates consumed so far."""
        return self._progress

    @property
    def consumed(self) -> Progress:
        """What all steps consumed so far, those among them whose update was left out."""
        return self._consumed

    @property
    def progress_after_next(self) -> Progress:
        """The same, when the next planned step is applied."""
        size = self._plan.global_batch_size
        return self._after(self._progress, size, self._gain_of(size))

    @property
    def noise_scale(self) -> float:
        """Averaged noise over averaged signal, in examples; NaN while unknown."""
        return self._state.averages.noise_scale

    @property
    def lr_factor(self) -> float:
        """The batch factor that ``optimizer.step()`` applies next."""
        if self._update is not None:
            return self._update.scaling.factor
        return self._scaling(self._plan.global_batch_size, self._consumed).factor

    @property
    def journal(self) -> Journal:
        """Where the steps are written down; ``path`` is None on all ranks but the first."""
        return self._journal

    @property
    def collectives(self) -> Collectives:
        """The ranks of the run."""
        return self._collectives

    @property
    def too_large(self) -> int | None:
        """The smallest micro-batch size that ran out of memory in its trial; None where none did."""
        return None if self._trials is None else self._trials.too_large

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
            self._progress.count(duration.unit)
        self._hold_until = duration

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
                all its micro-batches, on all ranks. Batch sizes, noise and noise scale stay in examples, of the step's
                average number of terms. The micro-batches of a step are fetched before it begins.
            allow_same_data: ranks may be given the same examples, to the bit, by a loader that is not a
                ``GlobalOrder``; without it that is an error at the first step of a pass.

        Raises:
            ValueError: a data set smaller than the largest batch, an empty loader, a loader whose micro-batches are not
                of ``micro_batch_size`` (the last may be smaller) or do not say how many examples they hold, a
                micro-batch that should grow with a loader that cannot, negative weights, ranks that hold different
                orders, plans or settings, or ranks that hold the same examples.
            RuntimeError: a step whose micro-batches were not all run; two steps in a row whose update never came;
                parameters that joined or left those that train; or an object that a newer one has replaced.
            TypeError: ``until`` without a unit, or a loader that is none.
        """
        self._check_in_place()
        self._begun_loops = True
        if until is not None:
            if not isinstance(until, Duration):
                raise TypeError(f"until must be a duration, such as adabatch.examples({until!r}), got {until!r}")
            self._consumed.count(until.unit)  # a unit that is not counted fails here, not at the end
        self._check_ranks(loader)
        if isinstance(loader, GlobalOrder):
            check_fits(self._largest_known(), loader)
            order = self._weighed(loader.feed(self._collectives.rank, self._collectives.size), weigh)
            epoch = loader.epoch
            while (loader.epoch == epoch) if until is None else not self._consumed.reached(until):
                check_fits(self._plan.global_batch_size, loader)  # a schedule without limits gets there in time
                yield from self._one_step(order)
            return
        if self._grows_micro_batch:
            raise ValueError(
                f"max_micro_batch_size needs a GlobalOrder: a {type(loader).__name__} decides its micro-batch itself"
            )
        if count is num_examples_in:
            self._check_loader(loader)
        while until is None or not self._consumed.reached(until):
            epochs = EpochCounters(loader)
            micro_batches = LoaderFeed(
                loader,
                self._collectives,
                count=count,
                may_be_empty=self._just_loaded,
                allow_same_data=allow_same_data,
            )
            feed = self._weighed(micro_batches, weigh)
            self._just_loaded = False
            while until is None or not self._consumed.reached(until):
                before = self._consumed
                yield from self._one_step(feed)
                if self._consumed == before:
                    break
            epochs.advance()
            if until is None:
                return

    def _weighed(self, feed: Feed, weigh: Callable[[Any], float] | None) -> Feed:
        return feed if weigh is None else LossWeightedFeed(feed, weigh, self._collectives)

    def _one_step(self, feed: Feed) -> Iterator[Step]:
        """One step from ``feed``, or nothing where it is at its end."""
        self._check_in_place()
        self._flush()
        number = self._consumed.steps
        if self._check_every is not None and number % self._check_every == 0:
            self._heartbeat.mark("the check for drift", number)
            held = (
                self._plan,
                self._progress,
                self._consumed,
                self._state,
                [host_value(group.get("lr")) for group in self._groups],
            )
            check_same(self._collectives, self._model, plan=held, when=f"before step {number}")
        self._heartbeat.mark("the loading", number)
        portion = self._take(feed, number)
        if portion is None:
            return
        self._tell_engine()
        self._groups = self._optimizer.param_groups  # an engine may show only some of them while it steps
        probe = self._probe if self._state.until_probe == 0 and self._engine.measures_next() else None
        finish = partial(self._finish, feed=feed)
        step = Step(
            self._plan,
            portion,
            engine=self._engine,
            probe=probe,
            votes=self._votes,
            find_nonfinite=self._find_nonfinite,
            stopwatch=self._stopwatch,
            mark=partial(self._heartbeat.mark, step=number),
            check_trained=self._check_trained,
            finish=finish,
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

    def _take(self, feed: Feed, number: int) -> Portion | None:
        """The next step's portion, whose micro-batch every rank has the memory for, as far as that is tried."""
        portion = feed.take(self._plan)
        while self._trials is not None and portion is not None and self._trials.is_due(self._plan):
            self._heartbeat.mark("the trial of a larger micro-batch", number)
            if self._stopwatch is not None:
                self._stopwatch.interrupt()
            portion, fits = self._trials.run(self._plan, portion)
            if not fits:
                self._grid = replace(self._grid, micro_sizes=self._trials.sizes)
                self._plan = self._runnable(self._plan.global_batch_size)
                portion = feed.take(self._plan)
        return portion

    def _check_in_place(self) -> None:
        if self._gone is not None:
            raise RuntimeError(
                f"this AdaptiveBatch was {self._gone}, and cannot run any more steps; its state_dict() can be loaded into "
                f"a new one"
            )

    def _check_trained(self) -> None:
        """Before the first backward of a step, where all is frozen and thawed that will be."""
        if self._trained is not None:
            self._trained.check("AdaptiveBatch")

    def _count_missing(self) -> None:
        """After a step: whether its update came, or was left out by somebody who may."""
        update = self._update
        if update is None:
            self._missed = 0
            return
        if update.left_out or not update.finite or (self._scaled and not update.looked_at):
            return
        self._missed += 1
        if self._missed < 2:
            return
        kind, missing = kind_of(self._optimizer), " and ".join(self._hooks.missing)
        raise RuntimeError(
            f"the update never came for {self._missed} steps in a row: optimizer.step() of the {missing} was not called"
            f"{'' if missing == kind else f' (the optimizers are {kind})'}, so that the learning rate's progress stands "
            f"still and the batch has no effect on it. Step the optimizer that AdaptiveBatch was given, and not another "
            f"or one that was built later; with a GradScaler, also give it as AdaptiveBatch(scaler=...); where you leave "
            f"an update out yourself, call leave_out() of the AdaptiveBatch"
        )

    def _settle_left_out(self, step: Step) -> None:
        """The end of a step whose gradient an engine found not finite, so that it never stepped the optimizer."""
        if not self._engine.left_out():
            raise RuntimeError("the step's update never came: call engine.step() after `for batch in step`")
        step.settle(reduced=False)

    def _finish(self, step: Step, *, feed: Feed) -> None:
        """The end of the inner loop: decide, and keep what the update will need."""
        portion, before = step.portion, self._consumed
        self._step = None
        feed.consumed(portion)
        measured = step.moments
        if measured is not None and self._layer_weights is not None:
            measured = measured.weighted(self._layer_weights)
        step.decision = decide(
            self._criterion,
            measured,
            control=self._control,
            limits=self._limits,
            grid=self._grid,
            plan=self._plan,
            progress=self._after(before, portion.num_examples, self._gain_of(portion.num_examples)),
            state=self._state,
            loss=step.loss,
            timed=step.timed,
            finite=step.finite,
            hold_until=self._hold_until,
        )
        self._state = step.decision.state
        step_gain = self._gain_of(portion.num_examples)  # with this step's own measurement in it
        self._consumed = self._after(before, portion.num_examples, step_gain)
        entry = line(
            plan=step.plan,
            num_examples=portion.num_examples,
            before=before,
            loss=step.loss,
            moments=step.moments,
            averages=self._state.averages,
            decision=step.decision,
            seconds=None if step.timed is None else step.timed[1],
        )
        if self._trials is not None:
            entry |= self._trials.journal_entry()
        scaling = self._scaling(portion.num_examples, before)
        if floors := scaling.binding_floors(self._groups):
            entry["beta_floors"] = floors
        looked_at = step.probed or self._find_nonfinite is not None
        self._update = _Update(portion.num_examples, scaling, step_gain, step.finite, looked_at, entry)
        self._plan = step.decision.plan
        self._heartbeat.mark("what follows the micro-batches", before.steps, between=True)

    # --- around optimizer.step() ------------------------------------------------------------------------------------

    def _moved(self) -> StepOverrides:
        """What the batch changes about the update that is about to run, whose rates must be those of its width plan."""
        check_ratios(self._optimizer)
        update = self._update or self._begun
        if update is None:  # of a loop without us, whose batch is none of ours
            return StepOverrides(1.0)
        return StepOverrides(update.scaling.factor, update.scaling.settings, update.scaling.averaged)

    def _skips_update(self) -> bool:
        """Whether to leave out the update that is about to run."""
        if self._step is not None and self._step.waits:  # for its gradient to be reduced
            self._step.settle()
        update = self._update or self._begun
        return update is not None and (update.left_out or (self._skip_nonfinite and not update.finite))

    def _update_done(self, optimizer: Optimizer, rates: list[float], applied: bool) -> None:
        update, self._update = self._update, None
        if update is None:
            self._count_strange()
            return
        self._begun = update if self._running else None
        if applied:
            self._progress = self._after(self._progress, update.num_examples, update.gain)
        self._tell_engine()
        stored = [host_value(group.get("lr")) for group in self._groups]
        base = [host_value(group.get("initial_lr", group.get("lr"))) for group in self._groups]
        shape = [lr / b if b else math.nan for lr, b in zip(stored, base, strict=True)]
        if len(rates) < len(stored):
            rates = [lr * update.scaling.factor for lr in stored]
        lr = {"base": base, "shape": shape, "factor": update.scaling.factor, "applied": rates}
        self._journal.write({**update.entry, "lr": lr, "applied": applied, **self._engine.journal_entry()})

    def _count_strange(self) -> None:
        """An update outside of ``steps()``: the loop's own, or a sign that the loop is somebody else's."""
        if self._begun_loops:
            return
        self._strange_updates += 1
        if self._strange_updates == STRANGE_UPDATES:
            warnings.warn(
                f"an AdaptiveBatch was made for this {kind_of(self._optimizer)}, which has stepped {STRANGE_UPDATES} "
                f"times, and steps() of the AdaptiveBatch was never called: it changes neither batch nor learning rate. "
                f"Write the loop as `for step in batches.steps(loader)`; a Trainer or another framework that has the "
                f"loop itself needs an integration for it",
                RuntimeWarning,
                stacklevel=2,
            )

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
        self._update = self._begun = self._step = None

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The next plan, the control's memory and the progress: plain numbers, equal on all ranks.

        Taken between steps, after ``optimizer.step()``, it belongs to the next step: a resumed run repeats nothing.
        """
        return {
            "format": STATE_FORMAT,
            "plan": asdict(self._plan),
            "control": self._state.state_dict(),
            "progress": asdict(self._progress),
            "consumed": asdict(self._consumed),
            "reference_batch_size": self._reference,
            "trials": None if self._trials is None else self._trials.state_dict(),
        }

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
        if state["format"] > STATE_FORMAT:
            raise ValueError(
                f"the batch state was saved in format {state['format']}, this version reads up to {STATE_FORMAT}: "
                f"upgrade adabatch"
            )
        self.check_reference(state["reference_batch_size"])
        self._progress = self._resumed(Progress(**state["progress"]))
        self._consumed = self._resumed(Progress(**state["consumed"]))
        self._state = ControlState.from_state_dict(state["control"])
        self._reference = state["reference_batch_size"]
        if self._trials is not None:
            self._trials.load_state_dict(state.get("trials"))
            self._grid = replace(self._grid, micro_sizes=self._trials.sizes)
        plan = BatchPlan(**state["plan"])
        low, high = self._limits.runnable(self._consumed, self._grid)
        grid = self._grid
        runs = plan.dp_size == grid.dp_size and plan.micro_batch_size in grid.micro_sizes
        if not (runs and plan.accumulation_steps >= grid.min_accumulation and low <= plan.global_batch_size <= high):
            plan = self._runnable(plan.global_batch_size)
        self._plan = plan
        self._update = None
        self._just_loaded = True
        self._tell_engine()

    def check_reference(self, saved: int) -> None:
        """That a run which was given a reference batch size goes on from one with the same.

        Raises:
            ValueError: it is another one.
        """
        if self._reference_given and self._reference != saved:
            raise ValueError(
                f"the run was saved with reference_batch_size={saved}, this one was built with {self._reference}: its "
                f"learning rate would jump; resume with {saved} or leave it out, and change the learning rate instead"
            )

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

    # --- private ----------------------------------------------------------------------------------------------------

    def _first_plan(self) -> BatchPlan:
        low, high = self._limits.at(self._consumed)
        wanted = float(low)
        if isinstance(self._criterion, Schedule):
            wanted = min(max(self._criterion.wanted(Observation(None, self._consumed)), low), high)
        return self._grid.nearest(wanted, min_size=low, max_size=high)

    def _runnable(self, wanted: float) -> BatchPlan:
        """The plan nearest to a global batch size that limits and grid allow now."""
        low, high = self._limits.runnable(self._consumed, self._grid)
        return self._grid.nearest(wanted, min_size=low, max_size=high)

    def _scaling(self, global_batch_size: int, progress: Progress) -> UpdateScaling:
        """What the batch makes of an update of so many examples, whose size was chosen at this progress."""
        noise, signal = self._known()
        return self._rules.at(global_batch_size, progress, reference=self._reference, noise=noise, signal=signal)

    def _gain_of(self, global_batch_size: int) -> float | None:
        """Gain-steps that a step of so many examples is worth; None where nobody measures the noise."""
        return None if self._progress.gain_steps is None else self._scaling(global_batch_size, self._consumed).gain

    def _tell_engine(self) -> None:
        self._engine.stands_at(self._progress, self.lr_factor)

    def _known(self) -> tuple[float, float]:
        averages = self._state.averages
        return (averages.noise, averages.signal) if averages.weight > 0 else (math.nan, math.nan)

    def _after(self, progress: Progress, num_examples: int, gain_steps: float | None) -> Progress:
        per_example = self._tokens_per_example
        return progress.after(num_examples, None if per_example is None else num_examples * per_example, gain_steps)

    def _resumed(self, saved: Progress) -> Progress:
        """Saved progress in the units that this run counts, which may be others than those of the run that saved it."""
        per_example, tokens, gains = self._tokens_per_example, saved.tokens, saved.gain_steps
        if per_example is None:
            tokens = None
        elif tokens is None:
            tokens = saved.examples * per_example
        if self._progress.gain_steps is None:
            gains = None
        elif gains is None:
            gains = float(saved.steps)  # a step in which nothing was measured is worth one, as in any run
        return Progress(examples=saved.examples, steps=saved.steps, tokens=tokens, gain_steps=gains)

    def _check_loader(self, loader: Iterable[Any]) -> None:
        micro = self._plan.micro_batch_size
        if isinstance(loader, DataLoader) and loader.batch_size not in (None, micro):
            raise ValueError(
                f"the DataLoader has batch_size={loader.batch_size}, but micro_batch_size={micro}: give both the same "
                f"(a larger batch is made by accumulation)"
            )

    def _largest_known(self) -> int:
        """The largest batch that limits or criterion name beforehand; the present one where they name none."""
        _, high = self._limits.at(self._consumed)
        if isinstance(self._criterion, Schedule) and self._criterion.fixed_sizes:
            return min(high, max(self._criterion.fixed_sizes))
        return high if high < UNLIMITED else self._plan.global_batch_size

    def _check_ranks(self, loader: object) -> None:
        """Ranks that would go separate ways raise together, rather than wait for each other."""
        order = loader if isinstance(loader, GlobalOrder) else None
        place = None if order is None else order.state_dict()
        gives = None if self._probe is None else self._probe.gives
        settings = (self._rules.rule, self._reference, self._rules.followers, gives, self._control)
        tried = None if self._trials is None else self._trials.state_dict()
        mine = (place, self._plan, self._progress, self._consumed, settings, self._votes.listening, tried)
        if not self._collectives.agree(mine):
            raise ValueError(
                f"the ranks hold different data orders, batch plans or settings (this one: data {place}, {self._plan}, "
                f"{self._consumed}): give all the same data set, seed, arguments and saved state"
            )
