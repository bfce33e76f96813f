"""The rounds of local SGD: when they begin and end, and what they average."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adabatch.batch.plan import Progress
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.local_sgd.averages import WorkerAverages
from adabatch.runtime.local_sgd.fragments import deal, due
from adabatch.runtime.local_sgd.meetings import Purpose
from adabatch.runtime.local_sgd.memory import Fragment, Memory
from adabatch.runtime.local_sgd.pace import StepClock, own_steps
from adabatch.runtime.local_sgd.periods import Fixed, RoundStart
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round
from adabatch.runtime.optimizers.joined import each_of


class Rounds:
    """The rounds of one worker.

    Attributes:
        averages: with the other workers.
        exchange: what they send each other.
        meetings: where they find out whether all do the same.
        dealt: the places of each fragment's parameters.
        replica: the model of the worker.
        workers: the ranks that average with each other.
        node: the ranks that share this worker's model.
        everyone: all ranks of all workers.
        leaves_out: whether the loop has said that it leaves the update of this step out.

    Args:
        settings: of ``LocalSGD``.
        replica: the model of this worker.
        optimizer: its steps are counted.
        workers, node: see above.
    """

    def __init__(
        self,
        settings: LocalSGDSettings,
        replica: Replica,
        optimizer: Optimizer,
        *,
        workers: Collectives,
        node: Collectives,
    ) -> None:
        self.settings = settings
        self.replica = replica
        self.workers = workers
        self.node = node
        self.everyone = workers.over(node)
        self.leaves_out = False
        sizes = [p.numel() for p in replica.parameters]  # of whole parameters, not of shards: the same on all ranks
        self.dealt = deal(replica.layers, sizes, settings.fragments)
        memory = Memory([Fragment(places) for places in self.dealt])
        self.averages = WorkerAverages(settings, replica, optimizer, memory, workers=workers, node=node)
        self.exchange = self.averages.exchange
        self.meetings = self.averages.meetings
        self._optimizer = optimizer
        self._stepped: set[Optimizer] = set()  # those of several optimizers that have stepped since the last local step
        self._standing: tuple[Progress, float] | None = None
        self._gradient_averaged = False
        self._clock = StepClock(replica.device) if settings.by_speed else None

    @property
    def memory(self) -> Memory:
        """The state of the worker."""
        return self.averages.memory

    @property
    def gradient_averaged(self) -> bool:
        """Whether the gradient of the current step is already the mean of all workers."""
        return self._gradient_averaged

    def stands_at(self, applied: Progress, consumed: Progress, lr_factor: float) -> None:
        """Sets the progress of the run, in units that a worker does not count itself, and the batch factor on its
        rates."""
        # Rounds follow what was consumed, since all workers agree on that even if one has left an update out by
        # mistake: they would meet for different things.
        self._standing = consumed, lr_factor
        self.meetings.applied = applied

    def present(self) -> Round:
        """The current round; it begins when this is first read."""
        # Only when it is asked for: a period may read the learning rate, which is set by the first step at the latest.
        if self.memory.round is None:
            self.memory.round = self._begin_round()
        return self.memory.round

    def _next_round(self) -> tuple[Round, bool]:
        """The round that the next step would begin, and whether it begins without a meeting."""
        progress, factor = self._standing or (Progress(steps=self.memory.steps), 1.0)
        # Host sync if a rate is on an accelerator, once per round.
        rates = [group for group in self._optimizer.param_groups if group.get("lr") is not None]
        lr = factor * max((float(group["lr"]) for group in rates), default=0.0)
        # schedulers of torch, and ProgressLR, keep the rate without the shape under this name
        peak = factor * max((float(group.get("initial_lr", group["lr"])) for group in rates), default=0.0)
        agree = self.memory.states_agree and not self.memory.apart
        begun = self.settings.begin(RoundStart(progress, lr, peak), workers_agree=agree)
        # Rounds of different lengths would send different things at the same time, and wait for each other forever.
        # Synchronous rounds of a single step are not compared: that would cost a reduction at every step.
        # In the background they are told so with what they send: here they would wait for each other.
        known = isinstance(self.settings.period, Fixed) and begun.local_steps == 1
        return begun, known or bool(self.settings.overlap)

    def _begin_round(self) -> Round:
        if self._standing is None:
            self._check_units()
        begun, without_meeting = self._next_round()
        if not without_meeting:
            self.meetings.begin(self.memory.place(begun))
        if self.settings.by_speed and begun.local_steps > 1:
            # A step for each fragment: workers that average two after the same step, and others that do not, would
            # differ in which fragments are still apart at the end of a round.
            least = self.settings.fragments
            own = own_steps(begun.local_steps, self.memory.seconds, self.workers.rank, at_least=least)
            return begun._replace(local_steps=own)
        return begun

    def _counts_units(self) -> bool:
        return all(duration.unit == "steps" for duration in self.settings.durations)

    def _check_units(self) -> None:
        for duration in self.settings.durations:
            if duration.unit != "steps":
                raise ValueError(
                    f"local SGD cannot count {duration} by itself: give it to AdaptiveBatch(local_sgd=), or the "
                    f"duration in steps"
                )

    def average_gradient(self) -> None:
        """Before a step: averages its gradient, if that replaces the average of the parameters after it."""
        if self.present().by_gradient:
            self.replica.put_gradients(self._mean_gradients())
            self._gradient_averaged = True

    def _mean_gradients(self, purpose: Purpose = Purpose.AVERAGE) -> list[Tensor | None]:
        """The mean gradient of all workers, which compare what they have done."""
        place = self.memory.place()
        with self.meetings.reporting(place):
            mean, told = self.replica.mean_gradients(
                self.exchange, weight=1 / self.workers.size, riding=self.meetings.bits(place, purpose)
            )
        self.meetings.check_bits(told, purpose)
        return mean

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimizer, or one of several, is about to step."""
        # After leave_out() the call is optional, so workers may differ in it: they compare how many updates they made.
        if not self.leaves_out:
            self.meetings.local_steps.before(optimizer)
        # AdaptiveBatch has averaged it at the end of its inner loop; in other loops this is the first call.
        if not self._gradient_averaged:
            self.average_gradient()
        self._keep_anchors()

    def _keep_anchors(self) -> None:
        if self.present().needs_anchor:
            pieces = self.replica.pieces()
            for fragment in self.memory.fragments:
                fragment.anchors = fragment.anchors or [piece.clone() for piece in fragment.of(pieces)]

    def after_step(self, optimizer: Optimizer) -> None:
        """The optimizer, or one of several, has stepped; the last of them ends the local step."""
        if not self.leaves_out:
            self.meetings.local_steps.after(optimizer)
        self._stepped.add(optimizer)
        if len(self._stepped) == len(each_of(self._optimizer)):
            self.end_step()

    @property
    def in_step(self) -> bool:
        """Whether some of several optimizers have stepped, but not all."""
        return bool(self._stepped)

    def miss_step(self) -> None:
        """The loop has gone on without ``optimizer.step()``. A local step is counted all the same, so that this worker
        meets the others where they wait for it."""
        self.meetings.num_missed += not self.leaves_out
        self._keep_anchors()
        self.end_step()

    def end_step(self) -> None:
        """A local step is over; averages may be due or begin, and the round may end."""
        self._stepped.clear()
        self.leaves_out = False
        self._gradient_averaged = False
        memory, present = self.memory, self.present()
        memory.steps += 1
        memory.step_in_round += 1
        memory.bytes_synchronous += self.exchange.ring_bytes(self.replica.pieces())
        ends = memory.step_in_round == present.local_steps
        if self._clock is not None:
            self._clock.step(self.exchange.traffic.seconds_waited, last=ends)
            self.averages.seconds = self._clock.seconds
        # before new ones begin: the next average of a fragment starts from parameters with its last one in them
        for fragment in memory.fragments:
            self.averages.go_on(fragment)
        for turn in due(memory.step_in_round, present.local_steps, len(memory.fragments)):
            average = self.averages.start if present.overlap else self.averages.average
            average(present, memory.fragments[turn])
        if ends:
            self._end_round()

    def end_round(self) -> None:
        """Averages all in which the workers differ; the next step begins another round."""
        if not self.memory.apart:
            return
        for fragment in self._under_way():
            self.averages.finish(fragment)
        for fragment in self.memory.apart:
            self.averages.average(self.present(), fragment)
        self._end_round()

    def _end_round(self) -> None:
        self.memory.end_round()
        if self._clock is not None:
            self._clock.round_over(self.exchange.traffic.seconds_waited)

    def leave(self) -> None:
        """The loop is over: averages all in which the workers differ, and compares their last steps."""
        self.end_round()
        self.come(Purpose.LEAVE)

    def come(self, purpose: Purpose) -> None:
        """This worker comes for something else than a step, which all of them do: it compares its last steps with
        theirs.

        Raises:
            RuntimeError: on all workers, if others come for something else, or have made other steps.
        """
        if self._next_sends_gradient():
            # Workers that take another step send a gradient. One that does not sends something of the same shape,
            # since a transport such as gloo aborts the process if shapes differ.
            self._mean_gradients(purpose)
        else:
            self.meetings.come(self.memory.place(), purpose)

    def _next_sends_gradient(self) -> bool:
        """Whether the first that a worker would send in its next step is its gradient."""
        if self.memory.round is not None:
            return self.memory.round.by_gradient
        if self._standing is None and not self._counts_units():  # it would be an error
            return False
        begun, without_meeting = self._next_round()
        return begun.by_gradient and without_meeting

    def state_dict(self) -> dict[str, Any]:
        """That of the memory, after all that is under way has arrived.

        Raises:
            RuntimeError: if this worker has made a mistake, of which the others are to hear.
        """
        self.meetings.check_noted()
        for fragment in self._under_way():
            self.averages.arrive(fragment)
        return self.memory.state_dict(self.workers.size, self.settings)

    def _under_way(self) -> list[Fragment]:
        """The fragments whose averages are under way, the first that began first."""
        # in one order on all workers, since each arrival waits for the others
        begun = [(each.pending.since, n, each) for n, each in enumerate(self.memory.fragments) if each.pending]
        return [fragment for _, _, fragment in sorted(begun, key=lambda each: each[:2])]

    def measures_next(self) -> bool:
        """Whether the gradient of the next step is to be measured."""
        present = self.present()
        return self.memory.step_in_round == (0 if self.settings.measure == "first" else present.local_steps - 1)
