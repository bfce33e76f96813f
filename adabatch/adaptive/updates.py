"""The update of each step, from the end of the step's inner loop until ``optimizer.step()`` has run or was left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch.optim import Optimizer

from adabatch.adaptive.late import LateNumbers, Numbers
from adabatch.adaptive.planning import Measured, Planner
from adabatch.adaptive.step import Step
from adabatch.adaptive.validation import check_before_step
from adabatch.batch.control import Decision, Reason
from adabatch.batch.plan import BatchPlan
from adabatch.guards.left_out import UpdatesInARow
from adabatch.guards.missing_updates import MissingUpdates
from adabatch.guards.repeated_updates import RepeatedUpdates
from adabatch.journal.writer import Journal, line
from adabatch.lr.follow import UpdateScaling
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.observers.protocol import Moment, Phase, StepObserver
from adabatch.runtime.optimizers.joined import each_of, kind_of, same_groups, weight_versions
from adabatch.runtime.optimizers.measured_norm import MeasuredNorm
from adabatch.runtime.optimizers.scheduler import WritesRates
from adabatch.runtime.optimizers.step_hooks import StepHooks, StepOverrides, rates_of
from adabatch.runtime.optimizers.traits import TakesNorm

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
    empty: bool  # all of its micro-batches have weight 0
    entry: dict[str, Any] | None  # of the journal; None for a step that does not count
    norm: MeasuredNorm | None  # of the gradients as the step left them, for optimizers that take it
    left_out: bool = False  # the loop said so
    alone: bool = False  # not finite on this rank, which steps alone; the plan, which all ranks share, counts it


class PendingUpdates:
    """The step under way and the update that its end prepared: what the update changes, and whether it is left out.

    Args:
        optimizer: whose steps are the updates. Its hooks are set here.
        engine: how the model runs.
        planner: counts the updates that are applied.
        journal: gets one line per step, once its update is over.
        observers: hear of the end of each inner loop and of each update.
        skip_nonfinite: whether updates whose loss or gradient is not finite are left out.
        in_a_row: is told whether steps were finite, where updates that are not may be made; None where none is.
        hand_norms: whether optimizers that take the norm that the probe has measured get it. They would add the squares
            in another order, so under a constant policy, which equals a plain loop to the bit, they do not.
        late: keeps what a step measured until the next one has ended; None if that is not late.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        engine: Engine,
        planner: Planner,
        journal: Journal,
        observers: StepObserver,
        skip_nonfinite: bool,
        in_a_row: UpdatesInARow | None,
        hand_norms: bool,
        late: LateNumbers | None,
    ) -> None:
        self._optimizer = optimizer
        self._groups = optimizer.param_groups
        self._engine = engine
        self._planner = planner
        self._journal = journal
        self._observers = observers
        self._skip_nonfinite = skip_nonfinite
        self._in_a_row = in_a_row
        self._late = late
        self._takes_norm = [one for one in each_of(optimizer) if hand_norms and isinstance(one, TakesNorm)]
        self._scaled = engine.backward.scale is not None
        self._step: Step | None = None  # the one under way, until it is decided
        self._running = False  # the loop stands inside a step
        self._update: _Update | None = None  # the one that a step's end prepared, until it is done
        self._begun: _Update | None = None  # the one that the optimizer last ran, for an engine that runs it in pieces
        self.num_left_out_alone = 0
        self._unapplied = False  # the gradients of the last step had no update, and are none of the next step's
        self._versions: list[int] = []  # of the weights, at the end of a step's inner loop
        self._missing = MissingUpdates(kind_of(optimizer))
        self._schedules: list[ReferenceType[WritesRates]] = []
        self._repeated = RepeatedUpdates(engine, optimizer)  # whose hooks run before the others
        self._hooks = StepHooks(optimizer, overrides=self._overrides, skip=self._skips, done=self._done)

    @property
    def lr_factor(self) -> float:
        """The batch factor that the next ``optimizer.step()`` applies."""
        if self._update is not None:
            return self._update.scaling.factor
        return self._planner.lr_factor

    def tell_engine(self) -> None:
        """Tells the engine how far the run is."""
        self._engine.stands_at(self._planner.progress, self._planner.consumed, self.lr_factor)

    # --- a step -----------------------------------------------------------------------------------------------------

    def begin_loop(self) -> None:
        """``steps()`` is called."""
        self._missing.begin_loop()

    def check_between(self) -> None:
        """Checks that no other loop over ``steps()`` waits for the update of its step.

        Raises:
            RuntimeError: if one does. Its update is then forgotten.
        """
        update = self._update
        if self._running and update is not None and self._owed(update):
            self._running = False  # said once: the other loop may have been left by an error
            self.flush()
            raise RuntimeError(
                f"another step was requested before the update of step {update.number}, which would be lost: call "
                f"optimizer.step() before the next step (in nested loops over steps() too), or leave_out() of the "
                f"AdaptiveBatch. (If an error ended the loop, its update is forgotten now: run the loop again)"
            )

    def _owed(self, update: _Update) -> bool:
        """Whether an update has no reason to be left out."""
        skipped = update.left_out or update.empty or update.alone or not update.finite
        # With a scaler, and a gradient that nobody looked at, a missing update may be an overflow that the scaler left
        # out.
        return not (skipped or (self._scaled and not update.looked_at))

    def begin_step(self) -> None:
        """A step is about to be made."""
        if self._unapplied and self._engine.holds_gradients:
            self._optimizer.zero_grad(set_to_none=True)
        self._unapplied = False
        self.tell_engine()
        self._groups = self._optimizer.param_groups  # an engine may show only some of them while it steps

    @contextmanager
    def inside(self, step: Step) -> Iterator[None]:
        """A context in which the loop runs the step's micro-batches and its update."""
        self._step = step
        self._running = True
        self._repeated.step_begins()
        try:
            yield
        except BaseException:  # the loop was broken off, by `break` among others, and its generator dropped
            step.break_off()
            self._begun = None
            if self._late is not None:
                self._late.read_if_there()
            raise
        finally:
            # an error may have left the batch factor on the learning rates
            self._hooks.restore()
            self._repeated.step_over()
            self._running = False

    def inner_loop_over(self) -> None:
        """The micro-batches of the step under way were run, and it is about to be decided."""
        if self._step is not None:
            self._repeated.gradient_ready(measured=self._step.probed)
        self._step = None
        # from here on only the update may change the weights, so other versions show an update that the hooks did not
        # see
        self._versions = weight_versions(self._optimizer)

    def prepare(
        self, step: Step, timed: tuple[BatchPlan, float] | None, *, looked_at: bool, more: Mapping[str, Any]
    ) -> None:
        """Decides on the plan after a step, and prepares the step's update.

        Args:
            step: whose micro-batches were run, and whose gradient was measured if it was to be.
            timed: a plan and the seconds that a step of it took; None if nothing was timed.
            looked_at: whether it is known if loss and gradient are finite.
            more: what else the journal's line says.
        """
        before, num_examples = self._planner.consumed, step.portion.num_examples
        numbers, empty = Numbers(before.steps, step.loss, step.moments, step.finite), step.empty
        if self._late is not None:
            numbers = self._late.exchange(step)
            empty = empty and numbers.step is None  # else the decision has a reason of its own
            self._planner.probe_waits = self._late.waiting
        age = 0 if numbers.step is None else before.steps - numbers.step
        if self._in_a_row is not None and numbers.step is not None and numbers.moments is not None and not empty:
            self._in_a_row.measured(numbers.step, finite=numbers.finite)
        ended = self._planner.end_step(
            Measured(num_examples, numbers.moments, numbers.finite, empty, numbers.loss, timed, age)
        )
        if step.empty:
            _log.warning("step %d is left out: all of its micro-batches have weight 0", before.steps)
        step.decision = ended.decision
        entry = line(
            plan=step.plan,
            num_examples=num_examples,
            before=before,
            loss=step.loss,
            moments=step.moments,
            averages=self._planner.state.averages,
            decision=ended.decision,
            timed=timed,
        )
        entry |= more
        if self._late is not None:
            entry["decided_by"] = numbers.step
        if floors := ended.scaling.binding_floors(self._groups):
            entry["beta_floors"] = floors
        norm = step.measured_norm() if self._takes_norm else None
        self._update = _Update(
            before.steps, num_examples, ended.scaling, ended.gain, step.finite, looked_at, step.empty, entry, norm
        )
        self._update.alone = step.left_out_alone
        self._observers.at(Phase.BETWEEN, Moment(before.steps, step.plan))

    def take_back(self, step: Step) -> None:
        """Ends a step that does not count: no update, no line in the journal, and the planner does not hear of it."""
        planner, num_examples = self._planner, step.portion.num_examples
        step.decision = Decision(planner.plan, Reason.NOT_COMMITTED, None, planner.state)
        number, scaling = planner.consumed.steps, planner.scaling(num_examples)
        _log.warning("step %d does not count, and is run again: not all replicas ended it", number)
        self._update = _Update(
            number, num_examples, scaling, None, finite=True, looked_at=True, empty=False, entry=None, norm=None
        )
        self._update.left_out = True
        self._observers.at(Phase.BETWEEN, Moment(number, step.plan))

    def end_step(self, step: Step) -> None:
        """Checks, when the loop asks for the next step, that this one was run and that its update came.

        Raises:
            RuntimeError: if the step or its update were not run.
        """
        left_out = step.waits
        if left_out:
            self._settle_left_out(step)
        if step.decision is None:
            raise RuntimeError(
                "the step's micro-batches were not all run: finish `for batch in step` before the next step, and do "
                "not break out of it"
            )
        if left_out or self._engine.left_out():
            return
        update = self._update
        if update is None:
            self._missing.came()
            return
        self._engine.update_missed()
        if self._owed(update):
            self._missing.missed(self._hooks.missing, moved=weight_versions(self._optimizer) != self._versions)

    def _settle_left_out(self, step: Step) -> None:
        """The end of a step whose optimizer the engine did not step, as the gradient was not finite."""
        if not self._engine.left_out():
            raise RuntimeError("the step's update never came: call engine.step() after `for batch in step`")
        step.settle(reduced=False)

    # --- around optimizer.step() ------------------------------------------------------------------------------------

    def add_schedule(self, schedule: WritesRates) -> None:
        """Tells a schedule of each update from now on, until it is dropped.

        Raises:
            ValueError: if it writes the rates of another optimizer of the same parameters.
        """
        if not same_groups(self._optimizer, schedule.optimizer):
            held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
            if any(id(p) in held for group in schedule.optimizer.param_groups for p in group["params"]):
                raise ValueError(
                    f"the schedule would write the learning rates of a {kind_of(schedule.optimizer)} that is not the "
                    f"{kind_of(self._optimizer)} of the AdaptiveBatch, and holds the same parameters: make the "
                    f"AdaptiveBatch and the ProgressLR with the same optimizer"
                )
        # weak, because a schedule that the user replaced must no longer write rates
        self._schedules = [*(held for held in self._schedules if held() is not None), ref(schedule)]

    def _each_schedule(self) -> Iterator[WritesRates]:
        return (schedule for held in self._schedules if (schedule := held()) is not None)

    def _overrides(self) -> StepOverrides:
        """What the batch changes about the update that is about to run."""
        check_before_step(self._optimizer)
        update = self._update or self._begun
        if update is None:  # an update outside of steps()
            return StepOverrides(1.0)
        if self._update is not None:  # and not another piece of it
            for schedule in self._each_schedule():
                schedule.check_rates()
        if update.norm is not None:
            for one in self._takes_norm:
                one.take_norm(update.norm)
            update.norm = None  # which holds the gradients
        return StepOverrides(update.scaling.factor, update.scaling.settings, update.scaling.averaged)

    def _skips(self) -> bool:
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
                f"and the scheduler's step(). (If an error ended the loop over steps(), call remove() of the "
                f"AdaptiveBatch first)"
            )
        update = self._update or self._begun
        if update is None:
            return False
        return update.left_out or update.empty or update.alone or (self._skip_nonfinite and not update.finite)

    def _done(self, optimizer: Optimizer, rates: list[float], applied: bool) -> None:
        update, self._update = self._update, None
        if update is None:
            self._missing.strange()
            return
        # an engine that steps in pieces calls optimizer.step() again for the same update
        self._begun = update if self._running else None
        if applied or (update.alone and not update.left_out):
            # not for updates that were left out: the learning rate would fall without the weights having moved
            self._planner.applied(update.num_examples, update.gain)
        self.tell_engine()
        if update.entry is not None:
            # only now: until the update the loop may still write the rates
            lr = self._lr_entry(update.scaling.factor, rates)
            if update.alone:
                self.num_left_out_alone += 1
                update.entry["reason"] = Reason.NOT_FINITE
            self._write(update, {"lr": lr, "applied": applied, **self._engine.journal_entry()})
        self._observers.after(update.number)

    def _write(self, update: _Update, ending: Mapping[str, Any]) -> None:
        """Writes the line of a step whose update is over."""
        entry = {**(update.entry or {}), **ending}
        if self._late is None:
            self._journal.write(entry)
        else:
            self._late.write(entry, update.number)

    def _lr_entry(self, factor: float, rates: list[float]) -> dict[str, Any]:
        """The three parts of the learning rate, and the rates that were in force, one per parameter group."""
        stored, base, shape = rates_of(self._groups)
        # an engine that shows only some groups while it steps reports the rates of those
        if len(rates) < len(stored):
            rates = [lr * factor for lr in stored]
        return {"base": base, "shape": shape, "factor": factor, "applied": rates}

    # --- without optimizer.step() -----------------------------------------------------------------------------------

    def leave_out(self) -> None:
        """The loop leaves out the update of the step whose micro-batches have just been run.

        Raises:
            RuntimeError: if not all micro-batches were run, or if the update has already come.
        """
        if self._update is None:
            raise RuntimeError("leave_out belongs after `for batch in step`, and before optimizer.step()")
        self._update.left_out = True
        self._repeated.left_out()
        self._engine.leaves_out()

    def settle_for_evaluation(self) -> None:
        """Makes sure that no step is unfinished, before the weights are judged.

        Raises:
            RuntimeError: if micro-batches of a step, or its ``optimizer.step()``, are still to be run.
        """
        self._settle(
            "an evaluation",
            "record it after optimizer.step(), and give AdaptiveBatch your GradScaler, if you have one, by "
            "engine=EngineOptions(scaler=)",
            scaled=self._scaled,
        )

    def check_not_inside(self, what: str) -> None:
        """Checks that no micro-batches of a step are still to be run, before something that belongs between two steps.

        Args:
            what: such as "a load".

        Raises:
            RuntimeError: if some are. After a loop that was broken off, none are.
        """
        if self._running and self._step is not None and not self._step.waits:
            self._running = False  # said once: the loop may have been left by an error
            raise RuntimeError(
                f"{what} belongs between two steps, and `for batch in step` has not been run to its end: call it after "
                f"optimizer.step(), or leave the loop over steps() first. (If an error ended the loop, it is forgotten "
                f"now: call it again)"
            )

    def settle(self, *, scaled: bool) -> None:
        """Makes sure that no step is unfinished, before the state is taken for a checkpoint.

        Args:
            scaled: whether a gradient scaler is in use, which may have left the update out.

        Raises:
            RuntimeError: if micro-batches of a step, or its ``optimizer.step()``, are still to be run.
        """
        self._settle(
            "a checkpoint", "save after optimizer.step(), and give save your GradScaler, if you have one", scaled=scaled
        )

    def _settle(self, what: str, way_out: str, *, scaled: bool) -> None:
        if self._step is not None and self._step.waits and self._engine.left_out():
            self._settle_left_out(self._step)
            scaled = True
        scaled = scaled or (self._update is not None and self._update.left_out)
        if self._step is not None or (self._update is not None and not scaled):
            left = "`for batch in step`" if self._step is not None else "optimizer.step()"
            raise RuntimeError(f"{what} belongs between two steps, and {left} has not been run to its end: {way_out}")
        self.flush()
        if self._late is not None:
            self._late.read()

    def flush(self) -> None:
        """Writes the line of a step whose update never came (a gradient scaler left it out, or it raised)."""
        self._hooks.forget()
        if self._update is not None:
            if self._update.entry is not None:
                self._write(self._update, {"lr": None, "applied": False})
            self._observers.after(self._update.number)
            # Left out, or never called in a loop that only measures: in either case the next step begins without these
            # gradients. They stay until then, so that they can be inspected after the loop.
            self._unapplied = True
        self._update = self._begun = self._step = None

    def drop(self) -> None:
        """Forgets the pending update: another state of the run is loaded."""
        # it belongs to the state that is replaced
        self._update = None
        self.tell_engine()
        for schedule in self._each_schedule():
            schedule.write_rates()

    def remove(self, reason: str) -> None:
        """Takes the hooks off the optimizer.

        Args:
            reason: what becomes of the run's ``AdaptiveBatch``, for its schedules.
        """
        for schedule in self._each_schedule():
            schedule.lose_source(reason)
        self._repeated.remove()
        self._hooks.remove()
        if self._late is not None:
            self._late.close()
