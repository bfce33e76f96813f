"""What the workers of local SGD send each other, now or in the background."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives, Started
from adabatch.runtime.local_sgd.compression import ENCODINGS, Compression
from adabatch.runtime.local_sgd.transfers import Encoded, Errors, Plain, Traffic, Transfer, ring_bytes


class Exchange:
    """Weighted means over the workers.

    Bytes are those that this worker sends if reductions run as a ring, which is the minimum: ``2 (n - 1) / n`` times
    what is reduced over n workers. A few dozen bytes of host numbers per round are not counted.

    Attributes:
        traffic: what was counted.

    Args:
        workers: the ranks that exchange.
        background: the same ranks, for what goes on while they work; None for ``workers``.
    """

    def __init__(self, workers: Collectives, background: Collectives | None = None) -> None:
        self._workers = workers
        self._background = background or workers
        self.traffic = Traffic()

    def ring_bytes(self, tensors: Sequence[Tensor]) -> int:
        """Bytes that this worker sends for a mean of the tensors."""
        return ring_bytes(tensors, self._workers.size)

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor], *, weight: float) -> None:
        """Overwrites the tensors with their weighted mean over the workers.

        Args:
            tensors: the same shapes in the same order on every worker.
            weight: of this worker; the weights of all sum to one.
        """
        if self._workers.size > 1:
            _put(tensors, Plain(self._workers, self.traffic, tensors, count=weight, wide=False).mean([1.0]))

    @torch.no_grad()
    def compressed_mean(
        self,
        tensors: Sequence[Tensor],
        anchors: Sequence[Tensor],
        *,
        shares: Sequence[float],
        compression: Compression,
        errors: Errors,
    ) -> None:
        """The same, but sends only the change since ``anchors``, which are equal on all workers, in fewer bits.

        Args:
            tensors, anchors: see above.
            shares: the weights of all workers, which sum to one.
            compression: how to encode the change.
            errors: of the exchanges before; updated.
        """
        if self._workers.size == 1 or compression == "none":
            self.mean(tensors, weight=shares[self._workers.rank])
            return
        transfer = Encoded(self._workers, self.traffic, tensors, anchors, ENCODINGS[compression], errors)
        _put(tensors, transfer.mean(shares))

    def tell(self, *numbers: float) -> Started:
        """Starts to send a few host numbers of every worker to all, which come as one row per worker."""
        # over the background's group, in which the average follows: both are started without waiting in between
        rows = torch.zeros(self._background.size, len(numbers), dtype=torch.float64)
        rows[self._background.rank] = torch.tensor(numbers, dtype=torch.float64)
        return self._background.start_sum(rows.to(self._background.device))

    def told(self, started: Started) -> list[list[float]]:
        """Waits for those numbers, by worker."""
        with self.traffic.waiting():
            rows: list[list[float]] = started.wait().tolist()  # host sync
        return rows

    @torch.no_grad()
    def start(
        self,
        tensors: Sequence[Tensor],
        anchors: Sequence[Tensor],
        *,
        count: float,
        compression: Compression,
        errors: Errors,
    ) -> Transfer:
        """Starts a mean in the background; the tensors may change at once.

        Args:
            tensors, anchors, compression, errors: as for ``compressed_mean``.
            count: the weight of this worker, any positive number.
        """
        if self._background.size == 1 or compression == "none":
            return Plain(self._background, self.traffic, tensors, count=count, wide=True)
        return Encoded(self._background, self.traffic, tensors, anchors, ENCODINGS[compression], errors)


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
