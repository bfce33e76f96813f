"""Means over the workers, in place, and the bytes that they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.local_sgd.compression import BLOCK, ENCODINGS, Compression, Encoding


@dataclass
class Errors:
    """The compression errors of this worker, which are added to the next exchange (error feedback).

    Args:
        sent: of the numbers that this worker sends, shape (num_workers * piece,), float32; empty before the first.
        returned: of the piece of the mean that it sends back, shape (piece,).
    """

    sent: Tensor = field(default_factory=lambda: torch.zeros(0))
    returned: Tensor = field(default_factory=lambda: torch.zeros(0))

    def fit(self, rows: Tensor) -> None:
        """Fills in zeros if nothing was exchanged yet."""
        if self.sent.numel() == 0:
            self.sent = torch.zeros_like(rows).flatten()
            self.returned = torch.zeros_like(rows[0])


class Exchange:
    """Weighted means over the workers.

    Bytes are those that this worker sends if reductions run as a ring, which is the minimum: ``2 (n - 1) / n`` times
    what is reduced over n workers. A few dozen bytes of host numbers per round are not counted.

    Args:
        workers: the ranks that exchange.
    """

    def __init__(self, workers: Collectives) -> None:
        self._workers = workers
        self.bytes_sent = 0

    def ring_bytes(self, tensors: Sequence[Tensor]) -> int:
        """Bytes that this worker sends for a mean of the tensors."""
        size = self._workers.size
        return 2 * (size - 1) * sum(tensor.numel() * tensor.element_size() for tensor in tensors) // size

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor], *, weight: float) -> None:
        """Overwrites the tensors with their weighted mean over the workers: one reduction per data type.

        Args:
            tensors: the same shapes in the same order on every worker.
            weight: of this worker; the weights of all sum to one.
        """
        if self._workers.size == 1:
            return
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        for kind in sorted(kinds, key=str):  # in the same order on every worker
            members = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
            # one message per data type: a reduction for each parameter would cost its latency each time
            # Weighted before the sum, because afterwards the workers' shares cannot be told apart.
            flat = torch.cat([tensor.reshape(-1) for tensor in members]).mul_(weight)
            self._workers.sum_in_place(flat)
            self.bytes_sent += self.ring_bytes([flat])
            for tensor, part in zip(members, _cut(flat, members), strict=True):
                tensor.copy_(part)

    @torch.no_grad()
    def compressed_mean(
        self,
        tensors: Sequence[Tensor],
        anchors: Sequence[Tensor],
        *,
        weight: float,
        compression: Compression,
        errors: Errors,
    ) -> None:
        """The same, but sends only the change since ``anchors``, which are equal on all workers, in fewer bits.

        It has two halves, as in a ring: every worker receives one piece of all changes, computes its mean, and sends
        that to all. Both halves are encoded, and their rounding errors are kept in ``errors``.
        """
        size = self._workers.size
        if size == 1 or compression == "none":
            self.mean(tensors, weight=weight)
            return
        flat = torch.cat(
            [(tensor - anchor).reshape(-1).float() for tensor, anchor in zip(tensors, anchors, strict=True)]
        )
        # _mean_of takes a plain mean; times the size, a worker's weight becomes its factor in it
        mean = self._mean_of(flat.mul_(weight * size), ENCODINGS[compression], errors)
        for tensor, anchor, change in zip(tensors, anchors, _cut(mean, tensors), strict=True):
            # onto the anchor, which is equal on all workers, as is the decoded change: so the parameters are equal to
            # the bit
            tensor.copy_(anchor + change)

    def _mean_of(self, flat: Tensor, encoding: Encoding, errors: Errors) -> Tensor:
        """Mean over the workers of ``flat``, shape (n,), float32."""
        size = self._workers.size
        # Whole blocks, because each block has a scale of its own in the encoding.
        piece = -(-flat.numel() // (size * BLOCK)) * BLOCK
        rows = flat.new_zeros(size, piece)
        rows.view(-1)[: flat.numel()] = flat
        errors.fit(rows)
        rows += errors.sent.view_as(rows)
        encoded = encoding.encode(rows)
        # Error feedback: what rounding lost now is sent next time, so that it does not accumulate.
        errors.sent = (rows - encoding.decode(encoded)).flatten()
        mean = encoding.decode(self._workers.exchange(encoded)).mean(0) + errors.returned
        back = encoding.encode(mean.view(1, -1))
        errors.returned = mean - encoding.decode(back)[0]
        self.bytes_sent += (size - 1) * (encoded.shape[1] + back.shape[1])
        return encoding.decode(self._workers.gather(back[0])).view(-1)[: flat.numel()]


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a flat tensor in the shapes of others."""
    pieces = torch.split(flat, [tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
