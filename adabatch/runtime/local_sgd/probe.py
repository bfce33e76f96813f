"""The noise of the gradient under local SGD, in which no rank has the mean gradient of all workers.

Any probe of one worker can measure this worker's parts. In addition it needs the gradient whose parts they are. Across
workers that is the mean of all workers' gradients, one reduction of the size of the model. Within a worker it is the
worker's own gradient, for which no vector is sent: each worker then estimates noise and signal from its own parts,
without bias, and a few numbers are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from adabatch.batch.moments import GradientMoments
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.probes.protocol import Probe

Spread = Literal["across", "within"]
"""Which parts are compared: those of all workers, or those within each worker."""


class WorkerProbe(Probe):
    """A probe of one worker, adapted to measure all of them.

    Args:
        inner: measures this worker, with all ranks of a sharded worker.
        replica: holds the gradients that the inner probe reads.
        exchange: averages them.
        num_workers: number of workers.
        worker_size: ranks that share one worker's model.
        across: called at every probed step: whether to compare the parts of all workers.
        averaged: called when a step's gradient is complete: whether it is already the mean of all workers.
    """

    def __init__(
        self,
        inner: Probe,
        replica: Replica,
        exchange: Exchange,
        *,
        num_workers: int,
        worker_size: int,
        across: Callable[[], bool],
        averaged: Callable[[], bool],
    ) -> None:
        self.gives = inner.gives
        self._inner = inner
        self._replica = replica
        self._exchange = exchange
        self._num_workers = num_workers
        self._worker_size = worker_size
        self._across = across
        self._averaged = averaged
        self._whole = False
        self._share = 1.0

    def start(self, dp_size: int) -> None:
        self._whole = self._across()
        # A probe of plain models divides what all ranks hold equally by their number, so it may count all workers. A
        # probe of sharded models adds up the shards of its own worker, and the workers' numbers are averaged.
        alike = self._whole and self._worker_size == 1
        self._share = 1.0 if alike else 1 / self._num_workers
        self._inner.start(dp_size if alike else self._worker_size)

    def begin_part(self, num_examples: int | None = None) -> None:
        self._inner.begin_part(num_examples)

    def end_part(self, num_examples: float, weight: float) -> None:
        self._inner.end_part(num_examples, weight)

    def collect(self) -> Tensor:
        """This rank's numbers; across workers, after one reduction of their gradients."""
        if not self._whole or self._averaged():
            return self._inner.collect() * self._share
        mean, _ = self._replica.mean_gradients(self._exchange, weight=1 / self._num_workers)
        with self._replica.with_gradients(mean):
            return self._inner.collect() * self._share

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments: of the global gradient, or the average of those of each worker."""
        moments = self._inner.moments(totals)
        return self._of_all(moments) if self._whole and self._worker_size > 1 else moments

    def _of_all(self, moments: GradientMoments) -> GradientMoments:
        """The average over all workers of the numbers of one sharded worker."""
        layers = moments.layers
        return moments._replace(
            # Squared norms and part sizes are averages over the workers by now; counts are still those of one worker.
            num_examples=moments.num_examples * self._num_workers,
            num_parts=moments.num_parts * self._num_workers,
            layers=None if layers is None else {name: self._of_all(layer) for name, layer in layers.items()},
        )

    def stop(self) -> None:
        self._inner.stop()

    def remove(self) -> None:
        self._inner.remove()
