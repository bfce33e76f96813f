"""The averages of the workers' parameters: at once, or in the background while they go on stepping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives, Started
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.local_sgd.memory import Fragment, Memory, Pending
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round
from adabatch.runtime.observers.trained_parameters import raise_first

UNCOUNTED = 1e-6
"""Examples of a worker that counted none: next to those that others counted nothing, and the same for all if nobody
did. It must be known before the others have said what they counted."""


class Averages:
    """The averages of one worker with the others.

    Attributes:
        memory: the state of the worker.
        exchange: with the other workers.
        changed: what has changed in this worker's parameters, which ends the run on all workers; None if nothing has.
        seconds: of a step of this worker, which the others are told; 0 if they are not timed.

    Args:
        settings: of ``LocalSGD``.
        replica: the model of this worker.
        memory: see above.
        workers: the ranks that average with each other.
        node: the ranks that share this worker's model.
    """

    def __init__(
        self, settings: LocalSGDSettings, replica: Replica, memory: Memory, *, workers: Collectives, node: Collectives
    ) -> None:
        self.memory = memory
        self.exchange = Exchange(workers, workers.beside() if settings.overlap else workers)
        self.changed: str | None = None
        self.seconds = 0.0
        self._settings = settings
        self._replica = replica
        self._workers = workers
        self._node = node

    # --- at once ----------------------------------------------------------------------------------------------------

    def average(self, present: Round, fragment: Fragment) -> None:
        """Averages a fragment, and with the last one the buffers."""
        size = self._workers.size
        shares = [1 / size] * size
        if not present.by_gradient:  # else the parameters are the same already
            _, told = self._tell(present, fragment)
            counts = self._counts(told)
            shares = [count / sum(counts) for count in counts]
        with self.reporting():
            if not present.by_gradient:
                self._average_parameters(present, fragment, shares)
            self.memory.agree_on(fragment)
            if not self.memory.apart or fragment is self.memory.fragments[-1]:
                self.exchange.mean(self._replica.buffers(), weight=shares[self._workers.rank])

    def _average_parameters(self, present: Round, fragment: Fragment, shares: Sequence[float]) -> None:
        """Averages the workers' parameters after local steps, and takes the outer step."""
        pieces = fragment.of(self._replica.pieces())
        self.exchange.compressed_mean(
            pieces, fragment.anchors, shares=shares, compression=present.compression, errors=fragment.errors
        )
        present.outer.step(pieces, fragment.anchors, fragment.momenta, lr=present.lr)
        if self._settings.average_state:
            state = self._replica.optimizer_state(fragment.places)
            if not self._workers.agree([(name, value.shape) for name, value in state.items()]):
                raise ValueError(
                    "the optimizer's state has other entries on this worker than on others, so average_state cannot "
                    "average it: a parameter got a gradient on some workers only; leave average_state out"
                )
            self.exchange.mean(list(state.values()), weight=shares[self._workers.rank])
        # If states differ, the same gradient would step workers differently: a round of one step then averages
        # parameters.
        self.memory.states_agree = self._settings.average_state or not self._replica.optimizer_state()

    # --- in the background ------------------------------------------------------------------------------------------

    def start(self, present: Round, fragment: Fragment) -> None:
        """Starts the average of a fragment, and with the last one that of the buffers."""
        if fragment.pending is not None:  # the round is shorter than the overlap
            self.finish(fragment)
        count, told = self._tell(present, fragment)
        buffers = self._replica.buffers() if fragment is self.memory.fragments[-1] else []
        with self.reporting():
            fragment.pending = Pending(
                self.memory.steps,
                present.lr,
                self.exchange.start(
                    fragment.of(self._replica.pieces()),
                    fragment.anchors,
                    count=count,
                    compression=present.compression,
                    errors=fragment.errors,
                ),
                self.exchange.start(buffers, [], count=count, compression="none", errors=fragment.errors),
                told,
            )
        fragment.counted = self.memory.examples

    def go_on(self, fragment: Fragment) -> None:
        """After a step: sends the second half of a compressed average half way, and applies an average when it is
        due."""
        pending, overlap = fragment.pending, self._settings.overlap
        if pending is None:
            return
        age = self.memory.steps - pending.since
        if age == overlap:
            self.finish(fragment)
        elif age == -(-overlap // 2):
            counts = self._weights(pending)
            with self.reporting():
                pending.parameters.go_on(counts)

    def arrive(self, fragment: Fragment) -> Pending:
        """Waits for the average of a fragment, which is applied later."""
        pending = fragment.pending
        assert pending is not None, "no average is under way"
        counts = self._weights(pending)
        with self.reporting():
            pending.arrive(counts)
        return pending

    def _weights(self, pending: Pending) -> list[float]:
        if pending.told is not None:
            pending.counts, pending.told = self._counts(pending.told), None
        return pending.counts

    @torch.no_grad()
    def finish(self, fragment: Fragment) -> None:
        """Waits for the average of a fragment, takes the outer step, and mixes it with what this worker has become."""
        pending = self.arrive(fragment)
        means, outer = pending.parameters.mean([]), self._settings.outer
        outer.step(means, fragment.anchors, fragment.momenta, lr=pending.lr)
        self._mix(fragment.of(self._replica.pieces()), means)
        buffers = pending.buffers.mean([])
        self._mix(self._replica.buffers()[: len(buffers)], buffers)
        fragment.pending = None
        fragment.anchors = means if outer.needs_anchor or self._settings.compression != "none" else []
        if self._settings.mix == 0:
            fragment.agreed_at = self.memory.steps

    def _mix(self, own: Sequence[Tensor], means: Sequence[Tensor]) -> None:
        for tensor, mean in zip(own, means, strict=True):
            tensor.lerp_(mean, 1 - self._settings.mix)

    # --- what the workers tell each other ---------------------------------------------------------------------------

    def _tell(self, present: Round, fragment: Fragment) -> tuple[float, Started]:
        """This worker's weight, any positive number, and what it tells the others with it."""
        memory, by_speed = self.memory, self._settings.by_speed
        examples, seconds = self._node.sum_of(memory.examples - fragment.counted, self.seconds)
        if by_speed:
            # Examples of a step: how far a worker has moved already grows with its steps, and to count them here again
            # would give the examples of faster workers more weight than those of slower ones.
            examples /= max(1, memory.steps - fragment.agreed_at)
        alike = self._settings.weights == "equal" or self._workers.size == 1
        count = 1.0 if alike else max(examples, UNCOUNTED)
        # by speed these numbers differ, and are not compared
        steps, local_steps = (0, 0) if by_speed else (memory.steps, present.local_steps)
        place = memory.rounds, steps, memory.fragments.index(fragment), local_steps
        with self.reporting():
            lr = present.lr if present.needs_anchor else 0.0
            told = count, float(self.changed is not None), *place, lr, seconds / self._node.size
            return count, self.exchange.tell(*told)

    def _counts(self, told: Started) -> list[float]:
        """The weights of all workers; also checks that all are at the same step of the same round."""
        with self.reporting():
            rows = self.exchange.told(told)
        if any(row[1] for row in rows):
            raise_first(self.changed, self._workers)
        if self._settings.by_speed and any(row[2] != rows[0][2] for row in rows):
            rounds = "; ".join(f"worker {index}: {row[2]:.0f}" for index, row in enumerate(rows))
            raise RuntimeError(f"workers came to the average after different numbers of rounds ({rounds})")
        if any(row[2:5] != rows[0][2:5] for row in rows):
            places = "; ".join(f"worker {index}: {row[3]:.0f}" for index, row in enumerate(rows))
            raise RuntimeError(
                f"workers came to the average after different numbers of steps ({places}): all must call "
                f"optimizer.step() equally often (a GradScaler leaves calls out)"
            )
        if any(row[5:7] != rows[0][5:7] for row in rows):
            rounds = "; ".join(f"worker {index}: {row[5]:.0f} steps at {row[6]:.6g}" for index, row in enumerate(rows))
            raise RuntimeError(
                f"the workers are in rounds of different lengths or learning rates ({rounds}): their learning rates "
                f"must be the same at every step"
            )
        if all(row[7] > 0 for row in rows):
            self.memory.seconds = [row[7] for row in rows]
        return [row[0] for row in rows]

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Explains the error of a failed exchange."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"local SGD could not finish round {self.memory.rounds + 1} (step {self.memory.steps}): a worker "
                f"ended, or the network failed; start all again from the last checkpoint ({error})"
            ) from error
