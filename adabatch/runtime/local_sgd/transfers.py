"""Means over the workers that are under way: what was sent, what is still to be sent, and what came of it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives, Started
from adabatch.runtime.local_sgd.compression import BLOCK, Encoding


@dataclass
class Traffic:
    """What the exchange costs this worker.

    Args:
        bytes_sent: to other workers so far, if reductions run as a ring.
        seconds_waited: in which its host could do nothing but wait for other workers.
    """

    bytes_sent: int = 0
    seconds_waited: float = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the seconds of the block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_waited += time.perf_counter() - begun


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


class Transfer(ABC):
    """A weighted mean of tensors over the workers. The tensors may change as soon as it has begun."""

    @abstractmethod
    def go_on(self, counts: Sequence[float]) -> None:
        """Waits for what the others sent first, and answers it, if that was not done yet.

        Args:
            counts: the weights of all workers; their sum may be any positive number.
        """
        ...

    @abstractmethod
    def mean(self, counts: Sequence[float]) -> list[Tensor]:
        """Waits for the mean; like the tensors, which are not changed."""
        ...


class Plain(Transfer):
    """One reduction per data type.

    Args:
        workers: the ranks that exchange.
        traffic: what is counted.
        tensors: the same shapes in the same order on every worker.
        count: the weight of this worker.
        wide: whether numbers of 16 bits are sent as float32, because counts of examples, by which they are multiplied,
            round in bfloat16 and overflow in float16.
    """

    def __init__(
        self, workers: Collectives, traffic: Traffic, tensors: Sequence[Tensor], *, count: float, wide: bool
    ) -> None:
        self._tensors, self._traffic = tensors, traffic
        kinds = sorted({_kind(tensor) for tensor in tensors})  # in the same order on every worker
        self._sums: dict[str, Started] = {}
        for kind in kinds:
            # one message per data type: a reduction for each parameter would cost its latency each time
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors if _kind(tensor) == kind])
            if wide and flat.element_size() < 4:
                flat = flat.float()
            traffic.bytes_sent += ring_bytes([flat], workers.size)
            self._sums[kind] = workers.start_sum(flat if count == 1 else flat.mul_(count))

    def go_on(self, counts: Sequence[float]) -> None:
        """Nothing: a reduction is one message."""

    @torch.no_grad()
    def mean(self, counts: Sequence[float]) -> list[Tensor]:
        total = sum(counts)
        parts = {}
        for kind, started in self._sums.items():
            with self._traffic.waiting():
                flat = started.wait()
            members = [tensor for tensor in self._tensors if _kind(tensor) == kind]
            parts[kind] = iter(_cut(flat if total == 1 else flat.div_(total), members))
        return [next(parts[_kind(tensor)]).to(tensor.dtype) for tensor in self._tensors]


class Encoded(Transfer):
    """The change since ``anchors``, which are equal on all workers, in fewer bits.

    It has two halves, as in a ring: every worker receives one piece of all changes, computes its mean, and sends that
    to all. Both halves are encoded, and their rounding errors are kept in ``errors``.
    """

    def __init__(
        self,
        workers: Collectives,
        traffic: Traffic,
        tensors: Sequence[Tensor],
        anchors: Sequence[Tensor],
        encoding: Encoding,
        errors: Errors,
    ) -> None:
        self._workers, self._traffic, self._encoding, self._errors = workers, traffic, encoding, errors
        self._tensors, self._anchors = tensors, anchors
        flat = torch.cat(
            [(tensor - anchor).reshape(-1).float() for tensor, anchor in zip(tensors, anchors, strict=True)]
        )
        # Whole blocks, because each block has a scale of its own in the encoding.
        piece = -(-flat.numel() // (workers.size * BLOCK)) * BLOCK
        rows = flat.new_zeros(workers.size, piece)
        rows.view(-1)[: flat.numel()] = flat
        errors.fit(rows)
        rows += errors.sent.view_as(rows)
        encoded = encoding.encode(rows)
        # Error feedback: what rounding lost now is sent next time, so that it does not accumulate.
        errors.sent = (rows - encoding.decode(encoded)).flatten()
        traffic.bytes_sent += (workers.size - 1) * encoded.shape[1]
        self._there = workers.start_exchange(encoded)
        self._back: Started | None = None

    @torch.no_grad()
    def go_on(self, counts: Sequence[float]) -> None:
        self._answered(counts)

    def _answered(self, counts: Sequence[float]) -> Started:
        if self._back is None:
            with self._traffic.waiting():
                received = self._encoding.decode(self._there.wait())
            shares = torch.tensor(counts, dtype=received.dtype, device=received.device) / sum(counts)
            # the same feedback for the second half, whose rounding all workers receive
            mean = (received * shares[:, None]).sum(0) + self._errors.returned
            back = self._encoding.encode(mean.view(1, -1))
            self._errors.returned = mean - self._encoding.decode(back)[0]
            self._traffic.bytes_sent += (self._workers.size - 1) * back.shape[1]
            self._back = self._workers.start_gather(back[0])
        return self._back

    @torch.no_grad()
    def mean(self, counts: Sequence[float]) -> list[Tensor]:
        back = self._answered(counts)
        with self._traffic.waiting():
            rows = back.wait()
        changes = _cut(self._encoding.decode(rows).view(-1), self._tensors)
        # onto the anchor, which is equal on all workers, as is the decoded change: so the mean is equal to the bit
        return [(a + change).to(a.dtype) for a, change in zip(self._anchors, changes, strict=True)]


class Arrived(Transfer):
    """A mean that has arrived."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def go_on(self, counts: Sequence[float]) -> None:
        """Nothing."""

    def mean(self, counts: Sequence[float]) -> list[Tensor]:
        return list(self._tensors)


def ring_bytes(tensors: Sequence[Tensor], size: int) -> int:
    """Bytes that one of ``size`` workers sends if a sum of the tensors over them runs as a ring."""
    return 2 * (size - 1) * sum(tensor.numel() * tensor.element_size() for tensor in tensors) // size


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.device}"


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The first numbers of a flat tensor in the shapes of others."""
    sizes = [tensor.numel() for tensor in like]
    pieces = torch.split(flat[: sum(sizes)], sizes)
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
