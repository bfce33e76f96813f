"""The micro-batch probe: the squared norm of every micro-batch's gradient on every rank, by tensor hooks.

A hook on a parameter sees the gradient of one backward on one rank, before it is accumulated, and before anything is
reduced over the ranks; for a tied weight it sees the sum of all its uses. So it serves plain models, DDP and ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from adabatch.batch.moments import GRAD_L1, NOISE, GradientMoments

BLOCK = 65_536
"""Elements whose squares are added in float32; longer tensors are cut up and their blocks added in float64. Added in
one go on the CPU, the squares of 10 million normal numbers come out 0.07 % too small."""


def norms(grad: Tensor, order: int = 2) -> Tensor:
    """Norms (Euclidean, or l1) of the rows or blocks of one gradient, in float32 at least; shape (num_blocks,)."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    if values.numel() <= BLOCK:
        whole: Tensor = torch.linalg.vector_norm(values, order, dtype=dtype).view(1)
        return whole
    if values.dim() > 1 and not values.is_contiguous() and values[0].numel() <= BLOCK:
        rows: Tensor = torch.linalg.vector_norm(values, order, dim=tuple(range(1, values.dim())), dtype=dtype)
        return rows
    flat = values.reshape(-1)
    rest = flat.numel() % BLOCK
    blocks: Tensor = torch.linalg.vector_norm(flat[: flat.numel() - rest].view(-1, BLOCK), order, dim=1, dtype=dtype)
    if rest == 0:
        return blocks
    return torch.cat([blocks, torch.linalg.vector_norm(flat[-rest:], order, dtype=dtype).view(1)])


def gathered(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Norms of many gradients in one float64 tensor; shape (num_blocks,)."""
    if len({piece.device for piece in pieces}) > 1:
        pieces = [piece.to(device) for piece in pieces]
    return torch.cat(pieces).to(device=device, dtype=torch.float64)


def sum_of_squares(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of norms in float64; shape ()."""
    return gathered(pieces, device).square().sum()


class MicroBatchProbe:
    """Noise and signal from micro-batches: each is a part, on each rank and in each accumulation step.

    It costs one pass over the gradients of each micro-batch and one over the step's gradient, a Python call a parameter
    and a few scalars of memory. Measured before clipping, in the gradient that the optimizer will see.

    Args:
        parameters: those whose gradients are measured; the ones that do not require a gradient are left out.
        record_l1: measure the l1 norm of the step's gradient too, in one more pass over it.

    Raises:
        ValueError: no parameter requires a gradient.
    """

    def __init__(self, parameters: Iterable[Tensor], *, record_l1: bool = False) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise ValueError(
                "the model has no parameter that requires a gradient: there is nothing to train or measure"
            )
        self._device = self._parameters[0].device
        self.gives = frozenset({NOISE, GRAD_L1} if record_l1 else {NOISE})
        self._record_l1 = record_l1
        self._norms: dict[int, Tensor] = {}
        self._in_pieces = False
        self._listening = False
        self._dp_size = 1
        self._handles = [
            p.register_hook(partial(self._listen, index))  # type: ignore[no-untyped-call]
            for index, p in enumerate(self._parameters)
        ]

    def _listen(self, index: int, grad: Tensor) -> None:
        if self._listening:
            self._in_pieces |= index in self._norms
            self._norms[index] = norms(grad)

    def start(self, dp_size: int) -> None:
        """A probed step begins."""
        self._dp_size = dp_size
        self._num_parts = 0
        self._parts_sq = torch.zeros((), dtype=torch.float64, device=self._device)
        self._inverse_part_size = 0.0
        self._inverse_num_examples = 0.0

    def begin_part(self) -> None:
        """The backward of a micro-batch begins."""
        self._norms.clear()
        self._in_pieces = False
        self._listening = True

    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended. ``weight`` is the micro-batch's share of this rank's gradient.

        Raises:
            RuntimeError: the backward reached no parameter, or one in several pieces.
        """
        self._listening = False
        if not self._norms:
            raise RuntimeError(
                "the backward of this micro-batch reached no parameter: is the loss computed from the model that was "
                "given to AdaptiveBatch, and not detached?"
            )
        if self._in_pieces:
            raise RuntimeError(
                "a parameter's gradient came in several pieces in one backward, whose norms do not add up: layers used "
                "twice under torch.utils.checkpoint need use_reentrant=False"
            )
        share = weight / self._dp_size
        # The hooks saw weight * g_j, so |g_j|^2 * share is what they saw, over weight * dp_size.
        self._parts_sq += sum_of_squares(list(self._norms.values()), self._device) / (weight * self._dp_size)
        self._norms.clear()
        self._inverse_part_size += share / num_examples
        self._inverse_num_examples += share**2 / num_examples
        self._num_parts += 1

    def collect(self) -> Tensor:
        """This rank's share of the sums, shape (4,), or (5,) with the l1 norm."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        pieces = [norms(grad) for grad in grads]
        # Every rank holds the reduced gradient; a dp-th of each one's norm makes all ranks use the same bits.
        grad_sq = sum_of_squares(pieces, self._device) / self._dp_size
        # full() fills on the device; a tensor of host numbers would be copied there, and the copy waited for.
        sizes = [
            torch.full((), size, dtype=torch.float64, device=self._device)
            for size in (self._inverse_part_size, self._inverse_num_examples)
        ]
        numbers = [self._parts_sq, grad_sq, *sizes]
        if self._record_l1:
            numbers.append(gathered([norms(grad, 1) for grad in grads], self._device).sum() / self._dp_size)
        return torch.stack(numbers)

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the sums over all ranks."""
        part_sq, grad_sq, inverse_part_size, inverse_num_examples, *l1 = totals
        return GradientMoments(
            part_sq=part_sq,
            part_size=1 / inverse_part_size,
            grad_sq=grad_sq,
            num_examples=1 / inverse_num_examples,
            num_parts=self._num_parts * self._dp_size,
            grad_l1=l1[0] if l1 else None,
        )

    def remove(self) -> None:
        """Takes every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
