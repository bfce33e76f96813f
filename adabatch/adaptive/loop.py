"""``StepLoop``: runs the steps that ``AdaptiveBatch.steps`` yields, from the data to the update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from adabatch.adaptive.late import LateNumbers
from adabatch.adaptive.options import Guard
from adabatch.adaptive.planning import Planner
from adabatch.adaptive.step import Step, StepTools
from adabatch.adaptive.updates import PendingUpdates
from adabatch.adaptive.validation import check_loop
from adabatch.arguments import level_of_the_user
from adabatch.batch.plan import Duration
from adabatch.guards.drift import DriftCheck
from adabatch.guards.finite import nonfinite_search
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.left_out import UpdatesInARow
from adabatch.guards.loop_mistakes import LoopMistakes
from adabatch.guards.memory_trials import Trials
from adabatch.guards.rank_places import RankPlaces
from adabatch.guards.same_settings import check_same_settings, failing_together, loop_settings, run_settings
from adabatch.guards.same_updates import SameUpdates
from adabatch.guards.step_schedules import StepSchedules
from adabatch.guards.votes import Votes
from adabatch.journal.writer import Journal
from adabatch.runtime.data import Feed, GlobalOrder, WholeSteps
from adabatch.runtime.data.passes import Passes, passes_over
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.observers.empty_parts import EmptyParts
from adabatch.runtime.observers.protocol import Moment, Observers, Phase
from adabatch.runtime.observers.stopwatch import Stopwatch
from adabatch.runtime.observers.trained_parameters import TrainedParameters
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.side_channel import SideChannel


class StepLoop:
    """The steps of a run, one after another: takes their data, measures them, and has their updates prepared.

    Attributes:
        order: the ``GlobalOrder`` that was read last; None if there is none.
        just_loaded: whether a state was loaded since the last pass. A loader that was loaded too may then have nothing
            left of its pass.
        votes: whether to stop or save after a step.
        heartbeat: what this rank is doing now.
        places: what the ranks tell each other of where they stand; None if they cannot.
        stopwatches: time the steps of a criterion that needs seconds; one or none.
        observers: hear of each phase of a step, the two above among them.
        trials: of larger micro-batches.
        late: keeps what a step measured until the next one has ended; None if that is not late.
        updates: the update of each step. Its hooks are set here.

    Args:
        model, optimizer: of the run.
        engine: how the model runs.
        channel: between the ranks of this run; None if there is none.
        planner: says how large each step is.
        journal: gets one line per step.
        probe: measures the gradients; None if nothing does.
        given_probe: whether the user made it, and not the engine.
        measures_late: whether what a step measured is read at the end of the next one.
        guard: what is checked and tried.
        check_every: number of steps between two checks for drift; None for no checks.
        grows_micro_batch: whether plans may change the size of the micro-batch.
        given: settings of the run that must be equal on all ranks, by name, besides those of the planner.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        *,
        engine: Engine,
        channel: SideChannel | None,
        planner: Planner,
        journal: Journal,
        probe: Probe | None,
        given_probe: bool,
        measures_late: bool,
        guard: Guard,
        check_every: int | None,
        grows_micro_batch: bool,
        given: Mapping[str, object],
    ) -> None:
        ranks, needs = engine.collectives, planner.policy.criterion.needs
        self.order: GlobalOrder | None = None
        self.just_loaded = False
        self._closed: str | None = None
        self._has_run = False
        self._optimizer = optimizer
        self._engine = engine
        self._planner = planner
        self._probe = probe
        self._grows_micro_batch = grows_micro_batch
        self._given = given
        self._updates_in_a_row = UpdatesInARow(guard.max_left_out)
        self.votes = Votes(ranks)
        self.heartbeat = Heartbeat()
        self.places = None if channel is None else RankPlaces(channel, self.heartbeat)
        self.stopwatches = [Stopwatch(ranks.size)] if needs.seconds else []
        self.observers = Observers(self.heartbeat, *self.stopwatches)
        self._drift: DriftCheck | None = None
        if check_every is not None:
            self._drift = DriftCheck(engine, optimizer, planner, every=check_every, observers=self.observers)
            self.observers.add(self._drift)
        self.trials = Trials(guard.trial, engine, probe, planner.micro_sizes)
        several = ranks.size > 1
        compares = several and check_every is not None
        trained = None
        if probe is not None or several:
            # a user's probe may measure the whole model, and an engine that updates by itself holds other tensors
            whole_model = given_probe or engine.reduced == "update"
            awaited = several and engine.stand_in in ("zeros", "flags")
            trained = TrainedParameters(model, optimizer, all_of_model=whole_model, waits_for_all=awaited)
        self.late = LateNumbers(journal) if measures_late else None
        self._tools = StepTools(
            engine=engine,
            votes=self.votes,
            observers=self.observers,
            places=self.places,
            riders=self.stopwatches,
            mistakes=LoopMistakes(engine, optimizer, compares=compares),
            empty_parts=EmptyParts(model),
            trained=trained,
            same_updates=SameUpdates(ranks, optimizer) if compares else None,
            find_nonfinite=nonfinite_search(optimizer, guard.skip_nonfinite, engine),
            late=measures_late,
        )
        # last: whatever fails above leaves no hook behind
        self.updates = PendingUpdates(
            optimizer,
            engine=engine,
            planner=planner,
            journal=journal,
            observers=self.observers,
            skip_nonfinite=bool(guard.skip_nonfinite),
            in_a_row=None if guard.skip_nonfinite is True else self._updates_in_a_row,
            hand_norms=bool(needs),
            late=self.late,
        )
        self._step_schedules = StepSchedules(optimizer, batch_size=lambda: planner.plan.global_batch_size)
        self.observers.add(self._step_schedules)

    def close(self, why: str) -> None:
        """Runs no more steps, and takes the hooks off the optimizer.

        Args:
            why: for the error of a later step. The first reason stays: an object that was replaced may be removed too.
        """
        self._closed = self._closed or why
        self.updates.remove(self._closed)

    def check_open(self) -> None:
        """Raises what became of the run, if it is closed.

        Raises:
            RuntimeError: see there.
        """
        if self._closed:
            raise RuntimeError(
                f"this AdaptiveBatch was {self._closed} and cannot run any more steps; its state_dict() can be loaded "
                f"into a new one"
            )

    def begin(
        self,
        loader: GlobalOrder | WholeSteps | Iterable[Any],
        *,
        until: Duration | None,
        count: Callable[[Any], int],
        weigh: Callable[[Any], float] | None,
        allow_same_data: bool,
    ) -> Passes:
        """The passes over a loader, once its ranks agree on everything that ``AdaptiveBatch.steps`` was given."""
        self.check_open()
        self.updates.begin_loop()
        self._tools.mistakes.begin_loop()
        self.heartbeat.begin_loop(self._planner.consumed.steps)
        if self.places is not None:
            self.places.begin_loop()
        ranks, planner = self._engine.collectives, self._planner
        given = loop_settings(loader, until=until, count=count, weigh=weigh, allow_same_data=allow_same_data)
        given |= run_settings(
            {**self._given, **planner.given()},
            self._optimizer,
            probe=self._probe,
            votes=self.votes,
            trials=self.trials,
        )
        # compared before the first collective of the loop: ranks with different settings would wait for each other,
        # each elsewhere
        with self._named():
            check_same_settings(ranks, given)
        with self._named(), failing_together(ranks, "steps(...)"):
            allow_same_data = check_loop(
                planner.consumed,
                ranks,
                until=until,
                count=count,
                weigh=weigh,
                allow_same_data=allow_same_data,
            )
            passes = passes_over(
                loader,
                ranks,
                plan=planner.plan,
                largest=planner.largest_known(),
                grows_micro_batch=self._grows_micro_batch,
                count=count,
                weigh=weigh,
                may_be_empty=self.just_loaded,
                allow_same_data=allow_same_data,
                together=not self._engine.runs_alone,
            )
            self._step_schedules.begin_loop(until)
            self.order = loader if isinstance(loader, GlobalOrder) else None
            self.just_loaded &= self.order is not None
        return passes

    def _named(self) -> AbstractContextManager[None]:
        """Around what waits for other ranks: names the one that has raised an error."""
        return nullcontext() if self.places is None else self.places.named()

    def one_step(self, passes: Passes) -> Iterator[Step]:
        """One step, or nothing if the pass over the data is over.

        Raises:
            RuntimeError: if a newer object has replaced the one of this loop, or the step or its update were not run.
        """
        self.check_open()
        self.updates.check_between()
        # the last step's line, if its update never came
        self.updates.flush()
        self._engine.before_step()
        tools, planner = self._tools, self._planner
        number = planner.consumed.steps
        self._updates_in_a_row.check(number, planner.progress.steps - self.updates.num_left_out_alone)
        with self._named():
            self.observers.before(number)
            self.observers.at(Phase.LOADING, Moment(number, planner.plan))
            feed = self.trials.over(passes, planner, self.observers)
            portion = feed.take(planner.plan)
        if portion is None:
            return
        self._has_run = True
        self.updates.begin_step()
        if tools.same_updates is not None:
            tools.same_updates.before(planner.progress)
        measures = planner.measures_next and self._engine.measures_next()
        step = Step(
            # `WholeSteps` say themselves what a step consists of
            portion.plan or planner.plan,
            portion,
            number=number,
            probe=self._probe if measures else None,
            tools=tools,
            finish=partial(self._finish, feed=feed),
        )
        with self.updates.inside(step):
            try:
                yield step
            except GeneratorExit:
                if self.places is not None:
                    self.places.left_loop(number)
                raise
        self.updates.end_step(step)

    def warn_of_nothing_left(self, until: Duration) -> None:
        """Warns that a loop has no step, since ``until`` was reached in an earlier one of this object.

        Not after a load: a run that was ended, and is started again, has nothing left to do.
        """
        if self._has_run and not self.just_loaded:
            warnings.warn(
                f"this loop has no step: until={until} counts from the beginning of the run, which has consumed "
                f"{self._planner.consumed.count(until.unit)} {until.unit} already. A loop that goes on needs a larger "
                f"until=; steps(loader) without it makes one pass",
                RuntimeWarning,
                stacklevel=level_of_the_user(),
            )

    def end(self) -> None:
        """The end of a loop over steps.

        Raises:
            RuntimeError: if a rank made a mistake in the last step; on all ranks.
            RanksDrifted: if some ranks have drifted; on all ranks.
        """
        if self.late is not None:
            self.late.check_last()
        if self._drift is not None:
            with self._named():
                self._drift.end(self._planner.consumed.steps)

    def _finish(self, step: Step, *, feed: Feed) -> None:
        """The end of the inner loop: decide, and keep what the update will need."""
        self.updates.inner_loop_over()
        if not self._engine.commits():
            self.updates.take_back(step)
            return
        # only now: a step that does not count is run again on the same data
        feed.consumed(step.portion)
        # What was timed comes in with what was measured.
        timed = next((watch.timed for watch in self.stopwatches if step.measured), None)
        looked_at = (step.probed and not step.unread) or self._tools.find_nonfinite is not None
        self.updates.prepare(step, timed, looked_at=looked_at, more=self.trials.journal_entry())
