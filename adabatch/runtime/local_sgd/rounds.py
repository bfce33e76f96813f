"""The rounds of local SGD: when they begin and end, and what they average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

from adabatch.batch.plan import Progress
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.local_sgd.memory import Memory
from adabatch.runtime.local_sgd.periods import Fixed, RoundStart
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round
from adabatch.runtime.observers.trained_parameters import raise_first


class Rounds:
    """The rounds of one worker.

    Attributes:
        memory: the state of the worker.
        exchange: with the other workers.
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
        self.exchange = Exchange(workers)
        self.memory = Memory()
        self._optimizer = optimizer
        self._standing: tuple[Progress, float] | None = None
        self._gradient_averaged = False
        self._changed: str | None = None

    @property
    def gradient_averaged(self) -> bool:
        """Whether the gradient of the current step is already the mean of all workers."""
        return self._gradient_averaged

    def stands_at(self, progress: Progress, lr_factor: float) -> None:
        """Sets the progress of the run, in units that a worker does not count itself, and the batch factor on its
        rates."""
        self._standing = progress, lr_factor

    def parameters_changed(self, changes: str | None) -> None:
        """Takes down what has changed in this worker's parameters, which is an error of all workers at their average.

        Raises:
            RuntimeError: if something changed, and the others would not hear of it: where gradients are averaged.
        """
        if changes is not None and (self.workers.size == 1 or self.present().by_gradient):
            raise RuntimeError(changes)
        self._changed = changes

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
        begun = self.settings.begin(RoundStart(progress, lr, peak), states_agree=self.memory.states_agree)
        # Rounds of different lengths would send different things at the same time, and wait for each other forever.
        told = (begun.local_steps, begun.by_gradient, lr if begun.needs_anchor else None)
        if not (isinstance(self.settings.period, Fixed) and begun.local_steps == 1) and not self.everyone.agree(told):
            raise ValueError(
                f"the workers begin different rounds (this one: {begun.local_steps} steps, at a learning rate of "
                f"{lr:.6g}): their learning rates must be the same at every step"
            )
        if begun.needs_anchor:
            self.memory.anchors = [piece.clone() for piece in self.replica.pieces()]
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
            with self._reporting():
                mean = self.replica.mean_gradients(self.exchange, weight=1 / self.workers.size)
            self.replica.put_gradients(mean)
            self._gradient_averaged = True

    def before_step(self) -> None:
        """The optimizer is about to step."""
        if not self._gradient_averaged:
            self.average_gradient()

    def after_step(self) -> None:
        """The optimizer has stepped; the round may end with it."""
        self._gradient_averaged = False
        self.memory.steps += 1
        self.memory.step_in_round += 1
        self.memory.bytes_synchronous += self.exchange.ring_bytes(self.replica.pieces())
        if self.memory.step_in_round == self.present().local_steps:
            self.end_round()

    def end_round(self) -> None:
        """Averages; the next step begins another round."""
        ended = self.present()
        weight = 1 / self.workers.size if ended.by_gradient else self._weight(ended)
        with self._reporting():
            if not ended.by_gradient:
                self._average(ended, weight)
            self.exchange.mean(self.replica.buffers(), weight=weight)
        self.memory.end_round()

    def _average(self, ended: Round, weight: float) -> None:
        """Averages the workers' parameters at the end of a round of local steps, and takes the outer step."""
        pieces = self.replica.pieces()
        self.exchange.compressed_mean(
            pieces, self.memory.anchors, weight=weight, compression=ended.compression, errors=self.memory.errors
        )
        ended.outer.step(pieces, self.memory.anchors, self.memory.momenta, lr=ended.lr)
        state = self.replica.optimizer_state()
        if self.settings.average_state:
            if not self.workers.agree([(name, value.shape) for name, value in state.items()]):
                raise ValueError(
                    "the optimizer remembers other things on this worker than on others, so average_state cannot "
                    "average them: a parameter got a gradient on some workers only; leave average_state out"
                )
            self.exchange.mean(list(state.values()), weight=weight)
        # If states differ, the same gradient would step workers differently: a round of one step then averages
        # parameters.
        self.memory.states_agree = self.settings.average_state or not state

    def _weight(self, ended: Round) -> float:
        """This worker's weight in the average; also checks that all workers are at the same step."""
        (examples,) = self.node.sum_of(self.memory.examples)
        with self._reporting():
            at = self.memory.rounds, self.memory.steps, ended.local_steps
            rows = self.workers.gather_of(examples, *at, float(self._changed is not None))
        if any(row[-1] for row in rows):
            raise_first(self._changed, self.workers)
        if any(row[1:-1] != rows[0][1:-1] for row in rows):
            places = "; ".join(f"worker {index}: {row[2]:.0f}" for index, row in enumerate(rows))
            raise RuntimeError(
                f"workers came to the average after different numbers of steps ({places}): all must call "
                f"optimizer.step() equally often (a GradScaler leaves calls out)"
            )
        total = sum(row[0] for row in rows)
        if self.settings.weights == "equal" or total == 0:
            return 1 / self.workers.size
        return rows[self.workers.rank][0] / total

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Explains the error of a failed exchange."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"local SGD could not finish round {self.memory.rounds + 1} (step {self.memory.steps}): a worker "
                f"ended, or the network failed; start all again from the last checkpoint ({error})"
            ) from error

    def measures_next(self) -> bool:
        """Whether the gradient of the next step is to be measured."""
        present = self.present()
        return self.memory.step_in_round == (0 if self.settings.measure == "first" else present.local_steps - 1)
