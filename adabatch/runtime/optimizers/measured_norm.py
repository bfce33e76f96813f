"""The norm of a step's gradient and its tensors, for an optimizer that would otherwise read them again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NUM_SAMPLED = 8
"""Number of gradients of which some elements are kept."""

SAMPLE = 4
"""Elements kept of each of them."""


class MeasuredNorm:
    """The squared norm of a gradient over all ranks, and whether gradients are still those that were measured.

    A gradient is the same if it is the same tensor, and torch has counted no change of it (``_version``). Torch does
    not count a gradient scaler's ``unscale_`` and writes through ``.data``. A few elements are therefore compared as
    well, which shows every operation on whole gradients. A write through ``.data`` to single elements, as in
    ``p.grad.data.clamp_(...)``, is not noticed unless it changes one of them.

    The elements are read on the CPU only, where reading does not wait. On other devices, and for gradients that are
    sharded, the norm is not passed on.

    Args:
        grad_sq: squared Euclidean norm of all gradients together.
        grads: the gradients.
    """

    def __init__(self, grad_sq: float, grads: Sequence[Tensor]) -> None:
        self.grad_sq = grad_sq
        self._grads = grads  # held, because the id of a freed tensor may be used for another one
        self._versions = {id(grad): grad._version for grad in grads}
        self._sample = self._sampled()

    @classmethod
    def of(cls, grad_sq: float, parameters: Iterable[Tensor]) -> MeasuredNorm | None:
        """The measurement of these parameters' gradients; None if a change of them could not be noticed."""
        grads = [p.grad for p in parameters if p.grad is not None]
        readable = all(type(grad) is Tensor and grad.is_cpu and grad.layout is torch.strided for grad in grads)
        return cls(grad_sq, grads) if grads and readable else None

    def is_of(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are the gradients that were measured, all of them, and unchanged."""
        versions = self._versions
        # The cheaper test first. More samples would find more changes, but sixteen take 0.04 ms longer than eight.
        if len(grads) != len(versions) or any(versions.get(id(grad)) != grad._version for grad in grads):
            return False
        # Zeros are the same under any factor, and show nothing.
        return bool(self._sample.any()) and torch.equal(self._sample, self._sampled())

    @torch.no_grad()
    def _sampled(self) -> Tensor:
        chosen = self._grads[:: -(-len(self._grads) // NUM_SAMPLED)]
        return torch.cat([grad.view(-1)[:SAMPLE] if grad.is_contiguous() else _first(grad) for grad in chosen])


def _first(grad: Tensor) -> Tensor:
    """Some elements of a gradient that is not contiguous, without a copy of it."""
    while grad.dim() > 1:
        grad = grad[0]
    return grad[:SAMPLE]
