"""The norm of a step's gradient and the tensors that it was measured of, for whoever would read them again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NUM_SAMPLED = 8
"""Gradients of which some elements are kept."""

SAMPLE = 4
"""Elements kept of each of them."""


class MeasuredNorm:
    """The squared norm of a gradient over all ranks, and how to tell whether gradients are still those it was taken of.

    A gradient is the same if it is the same tensor, and torch has counted no change of it (``_version``). Torch does
    not count what a gradient scaler's ``unscale_`` and writes through ``.data`` do. So a few elements are compared as
    well, which shows all that is done to whole gradients; a write through ``.data`` to single elements, as in
    ``p.grad.data.clamp_(...)``, goes unseen unless it meets one of them.

    The elements are read on the CPU only, where reading does not wait. On other devices, and for gradients that are
    sharded, no norm is handed on.

    Args:
        grad_sq: squared Euclidean norm of all gradients together.
        grads: the gradients.
    """

    def __init__(self, grad_sq: float, grads: Sequence[Tensor]) -> None:
        self.grad_sq = grad_sq
        self._grads = grads  # held: the number of a tensor that is gone may be given to another
        self._versions = {id(grad): grad._version for grad in grads}
        self._sample = self._sampled()

    @classmethod
    def of(cls, grad_sq: float, parameters: Iterable[Tensor]) -> MeasuredNorm | None:
        """What was measured of the gradients of these parameters; None where a change of them could not be seen."""
        grads = [p.grad for p in parameters if p.grad is not None]
        readable = all(type(grad) is Tensor and grad.is_cpu and grad.layout is torch.strided for grad in grads)
        return cls(grad_sq, grads) if grads and readable else None

    def is_of(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are the gradients that were measured, all of them, and unchanged."""
        versions = self._versions
        if len(grads) != len(versions) or any(versions.get(id(grad)) != grad._version for grad in grads):
            return False
        # Zeros stay what they are under any factor, and show nothing.
        return bool(self._sample.any()) and torch.equal(self._sample, self._sampled())

    @torch.no_grad()
    def _sampled(self) -> Tensor:
        chosen = self._grads[:: -(-len(self._grads) // NUM_SAMPLED)]
        return torch.cat([grad.view(-1)[:SAMPLE] if grad.is_contiguous() else _first(grad) for grad in chosen])


def _first(grad: Tensor) -> Tensor:
    """Some elements of a gradient that does not lie in one piece, without a copy of it."""
    while grad.dim() > 1:
        grad = grad[0]
    return grad[:SAMPLE]
