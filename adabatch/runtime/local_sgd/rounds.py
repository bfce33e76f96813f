"""The rounds of local SGD: when they begin and end, and what they average."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from adabatch.batch.plan import Progress
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.local_sgd.averages import Averages
from adabatch.runtime.local_sgd.fragments import deal, due
from adabatch.runtime.local_sgd.memory import Fragment, Memory
from adabatch.runtime.local_sgd.pace import StepClock, own_steps
from adabatch.runtime.local_sgd.periods import Fixed, RoundStart
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round


class Rounds:
    """The rounds of one worker.

    Attributes:
        averages: with the other workers.
        exchange: what they send each other.
        dealt: the places of each fragment's parameters.
        replica: the model of the worker.
        workers: the ranks that average with each other.
        node: the ranks that share this worker's model.
        everyone: all ranks of all workers.

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
        sizes = [p.numel() for p in replica.parameters]  # of whole parameters, not of shards: the same on all ranks
        self.dealt = deal(replica.layers, sizes, settings.fragments)
        memory = Memory([Fragment(places) for places in self.dealt])
        self.averages = Averages(settings, replica, memory, workers=workers, node=node)
        self.exchange = self.averages.exchange
        self._optimizer = optimizer
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

    def stands_at(self, progress: Progress, lr_factor: float) -> None:
        """Sets the progress of the run, in units that a worker does not count itself, and the batch factor on its
        rates."""
        self._standing = progress, lr_factor

    def parameters_changed(self, changes: str | None) -> None:
        """Notes how this worker's parameters have changed, which will be an error on all workers at their average.

        Raises:
            RuntimeError: if something changed, and the others would not hear of it: where gradients are averaged.
        """
        if changes is not None and (self.workers.size == 1 or self.present().by_gradient):
            raise RuntimeError(changes)
        self.averages.changed = changes

    def present(self) -> Round:
        """The current round; it begins when this is first read."""
        if self.memory.round is None:
            self.memory.round = self._begin_round()
        return self.memory.round

    def _begin_round(self) -> Round:
        if self._standing is None:
            self._check_units()
        progress, factor = self._standing or (Progress(steps=self.memory.steps), 1.0)
        # Host sync if a rate is on an accelerator, once per round.
        rates = [group for group in self._optimizer.param_groups if group.get("lr") is not None]
        lr = factor * max((float(group["lr"]) for group in rates), default=0.0)
        peak = factor * max((float(group.get("initial_lr", group["lr"])) for group in rates), default=0.0)
        agree = self.memory.states_agree and not self.memory.apart
        begun = self.settings.begin(RoundStart(progress, lr, peak), workers_agree=agree)
        # Rounds of different lengths would send different things at the same time, and wait for each other forever.
        # Synchronous rounds of a single step are not compared: that would cost a reduction at every step.
        # In the background they are told so with what they send: here they would wait for each other.
        told = (begun.local_steps, begun.by_gradient, lr if begun.needs_anchor else None)
        known = isinstance(self.settings.period, Fixed) and begun.local_steps == 1
        if not known and not self.settings.overlap and not self.everyone.agree(told):
            raise ValueError(
                f"the workers begin different rounds (this one: {begun.local_steps} steps, at a learning rate of "
                f"{lr:.6g}): their learning rates must be the same at every step"
            )
        if self.settings.by_speed and begun.local_steps > 1:
            # A step for each fragment: workers that average two after the same step, and others that do not, would
            # differ in which fragments are still apart at the end of a round.
            least = self.settings.fragments
            own = own_steps(begun.local_steps, self.memory.seconds, self.workers.rank, at_least=least)
            return begun._replace(local_steps=own)
        return begun

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
            with self.averages.reporting():
                mean = self.replica.mean_gradients(self.exchange, weight=1 / self.workers.size)
            self.replica.put_gradients(mean)
            self._gradient_averaged = True

    def before_step(self) -> None:
        """The optimizer is about to step."""
        # AdaptiveBatch has averaged it at the end of its inner loop; in other loops this is the first call.
        if not self._gradient_averaged:
            self.average_gradient()
        if self.present().needs_anchor:
            pieces = self.replica.pieces()
            for fragment in self.memory.fragments:
                fragment.anchors = fragment.anchors or [piece.clone() for piece in fragment.of(pieces)]

    def after_step(self) -> None:
        """The optimizer has stepped; averages may be due or begin, and the round may end."""
        self._gradient_averaged = False
        memory, present = self.memory, self.present()
        memory.steps += 1
        memory.step_in_round += 1
        memory.bytes_synchronous += self.exchange.ring_bytes(self.replica.pieces())
        ends = memory.step_in_round == present.local_steps
        if self._clock is not None:
            self._clock.step(self.exchange.traffic.seconds_waited, last=ends)
            self.averages.seconds = self._clock.seconds
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

    def state_dict(self) -> dict[str, Any]:
        """That of the memory, after all that is under way has arrived."""
        for fragment in self._under_way():
            self.averages.arrive(fragment)
        return self.memory.state_dict(self.workers.size, self.settings)

    def _under_way(self) -> list[Fragment]:
        """The fragments whose averages are under way, the first that began first."""
        begun = [(each.pending.since, n, each) for n, each in enumerate(self.memory.fragments) if each.pending]
        return [fragment for _, _, fragment in sorted(begun, key=lambda each: each[:2])]

    def measures_next(self) -> bool:
        """Whether the gradient of the next step is to be measured."""
        present = self.present()
        return self.memory.step_in_round == (0 if self.settings.measure == "first" else present.local_steps - 1)
