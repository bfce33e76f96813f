"""The averages of the workers' parameters: at once, or in the background while they go on stepping."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch.runtime.collectives import Collectives, Started
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.local_sgd.meetings import Meetings
from adabatch.runtime.local_sgd.memory import Fragment, Memory, Pending
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round

UNCOUNTED = 1e-6
"""Examples of a worker that counted none: next to those that others counted nothing, and the same for all if nobody
did. It must be known before the others have said what they counted."""


class WorkerAverages:
    """The averages of one worker with the others.

    Attributes:
        memory: the state of the worker.
        exchange: with the other workers.
        meetings: of the workers.
        seconds: of a step of this worker, which the others are told; 0 if they are not timed.

    Args:
        settings: of ``LocalSGD``.
        replica: the model of this worker.
        optimizer: whose steps are compared.
        memory: see above.
        workers: the ranks that average with each other.
        node: the ranks that share this worker's model.
    """

    def __init__(
        self,
        settings: LocalSGDSettings,
        replica: Replica,
        optimizer: Optimizer,
        memory: Memory,
        *,
        workers: Collectives,
        node: Collectives,
    ) -> None:
        self.memory = memory
        # a group of its own for the background: over one group, a reduction of the loop would wait behind an average
        self.exchange = Exchange(workers, workers.beside() if settings.overlap else workers)
        everyone = workers.over(node)
        self.meetings = Meetings(
            optimizer, self.exchange, workers=workers, everyone=everyone, by_speed=settings.by_speed
        )
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
        with self._reporting():
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
        with self._reporting():
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
            with self._reporting():
                pending.parameters.go_on(counts)

    def arrive(self, fragment: Fragment) -> Pending:
        """Waits for the average of a fragment, which is applied later."""
        pending = fragment.pending
        assert pending is not None, "no average is under way"
        counts = self._weights(pending)
        with self._reporting():
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
        # the means, not what they were mixed to: an anchor is the same on all workers, or changes could not be sent
        fragment.anchors = means if outer.needs_anchor or self._settings.compression != "none" else []
        # with any other mix each worker has kept a part of its own
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
        place = memory.place(present)._replace(fragment=memory.fragments.index(fragment))
        return count, self.meetings.tell(count, place, seconds=seconds / self._node.size)

    def _counts(self, told: Started) -> list[float]:
        """The weights of all workers, which have told how fast they are, too."""
        rows = self.meetings.told(told)
        if all(row.seconds > 0 for row in rows):
            self.memory.seconds = [row.seconds for row in rows]
        return [row.weight for row in rows]

    def _reporting(self) -> AbstractContextManager[None]:
        return self.meetings.reporting(self.memory.place())
