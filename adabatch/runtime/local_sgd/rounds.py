"""The rounds of local SGD: when they begin and end, and what they average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.optim import Optimizer

from adabatch.batch.plan import Progress
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.local_sgd.fragments import deal, due
from adabatch.runtime.local_sgd.memory import Fragment, Memory
from adabatch.runtime.local_sgd.periods import Fixed, RoundStart
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round
from adabatch.runtime.trained_parameters import raise_first


class Rounds:
    """The rounds of one worker.

    Attributes:
        memory: the state of the worker.
        exchange: with the other workers.
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
        self.exchange = Exchange(workers)
        sizes = [p.numel() for p in replica.parameters]  # of whole parameters, not of shards: the same on all ranks
        self.dealt = deal(replica.layers, sizes, settings.fragments)
        self.memory = Memory([Fragment(places) for places in self.dealt])
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
        agree = self.memory.states_agree and not self.memory.apart
        begun = self.settings.begin(RoundStart(progress, lr, peak), workers_agree=agree)
        # Rounds of different lengths would send different things at the same time, and wait for each other forever.
        told = (begun.local_steps, begun.by_gradient, lr if begun.needs_anchor else None)
        if not (isinstance(self.settings.period, Fixed) and begun.local_steps == 1) and not self.everyone.agree(told):
            raise ValueError(
                f"the workers begin different rounds (this one: {begun.local_steps} steps, at a learning rate of "
                f"{lr:.6g}): their learning rates must be the same at every step"
            )
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
        if self.present().needs_anchor:
            pieces = self.replica.pieces()
            for fragment in self.memory.fragments:
                fragment.anchors = fragment.anchors or [piece.clone() for piece in fragment.of(pieces)]

    def after_step(self) -> None:
        """The optimizer has stepped; it may be the turn of a fragment, and the end of the round."""
        self._gradient_averaged = False
        memory, present = self.memory, self.present()
        memory.steps += 1
        memory.step_in_round += 1
        memory.bytes_synchronous += self.exchange.ring_bytes(self.replica.pieces())
        turns = due(memory.step_in_round, present.local_steps, len(memory.fragments))
        self._average(present, [memory.fragments[turn] for turn in turns])
        if memory.step_in_round == present.local_steps:
            memory.end_round()

    def end_round(self) -> None:
        """Averages all in which the workers differ; the next step begins another round."""
        if self.memory.apart:
            self._average(self.present(), self.memory.apart)
            self.memory.end_round()

    def _average(self, present: Round, fragments: Sequence[Fragment]) -> None:
        """Averages fragments, and with the last one the buffers."""
        for fragment in fragments:
            weight = 1 / self.workers.size if present.by_gradient else self._weight(present, fragment)
            with self._reporting():
                if not present.by_gradient:
                    self._average_parameters(present, fragment, weight)
                self.memory.agree_on(fragment)
                if not self.memory.apart or fragment is self.memory.fragments[-1]:
                    self.exchange.mean(self.replica.buffers(), weight=weight)

    def _average_parameters(self, present: Round, fragment: Fragment, weight: float) -> None:
        """Averages the workers' parameters after local steps, and takes the outer step."""
        pieces = fragment.of(self.replica.pieces())
        self.exchange.compressed_mean(
            pieces, fragment.anchors, weight=weight, compression=present.compression, errors=fragment.errors
        )
        present.outer.step(pieces, fragment.anchors, fragment.momenta, lr=present.lr)
        if self.settings.average_state:
            state = self.replica.optimizer_state(fragment.places)
            if not self.workers.agree([(name, value.shape) for name, value in state.items()]):
                raise ValueError(
                    "the optimizer remembers other things on this worker than on others, so average_state cannot "
                    "average them: a parameter got a gradient on some workers only; leave average_state out"
                )
            self.exchange.mean(list(state.values()), weight=weight)
        # If states differ, the same gradient would step workers differently: a round of one step then averages
        # parameters.
        self.memory.states_agree = self.settings.average_state or not self.replica.optimizer_state()

    def _weight(self, present: Round, fragment: Fragment) -> float:
        """This worker's weight in the average; also checks that all workers are at the same step."""
        (examples,) = self.node.sum_of(self.memory.examples - fragment.counted)
        with self._reporting():
            at = self.memory.rounds, self.memory.steps, present.local_steps, self.memory.fragments.index(fragment)
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
