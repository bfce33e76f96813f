"""The micro-batch probe: the squared norm of every micro-batch's gradient on every rank, by tensor hooks.

A hook on a parameter sees the gradient of one backward on one rank, before it is accumulated, and before anything is
reduced over the ranks; for a tied weight it sees the sum of all its uses. So it serves plain models, DDP and ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from adabatch.batch.moments import GRAD_L1, LAYERS, NOISE, GradientMoments
from adabatch.runtime.layers import Layers, LayerSums
from adabatch.runtime.probes.norms import gathered, gradients_of, norms
from adabatch.runtime.probes.parts import PartSums

IN_PIECES = (
    "a parameter's gradient came in several pieces in one backward, whose norms do not add up: layers used twice under "
    "torch.utils.checkpoint need use_reentrant=False"
)


class MicroBatchProbe:
    """Noise and signal from micro-batches: each is a part, on each rank and in each accumulation step.

    It costs one pass over the gradients of each micro-batch and one over the step's gradient, a Python call a parameter
    and a few scalars of memory. Measured before clipping, in the gradient that the optimizer will see.

    Args:
        parameters: those whose gradients are measured; the ones that do not require a gradient are left out.
        record_l1: measure the l1 norm of the step's gradient too, in one more pass over it.
        layers: measure each of them as well; costs nothing but 16 bytes a layer in the reduction.

    Raises:
        ValueError: no parameter requires a gradient, or one that does is in no layer.
    """

    def __init__(self, parameters: Iterable[Tensor], *, record_l1: bool = False, layers: Layers | None = None) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise ValueError(
                "the model has no parameter that requires a gradient: there is nothing to train or measure"
            )
        self._device = self._parameters[0].device
        self.gives = frozenset({NOISE, *([GRAD_L1] if record_l1 else []), *([LAYERS] if layers else [])})
        self._record_l1 = record_l1
        self._layer_sums = LayerSums(self._parameters, layers, device=self._device)
        self._sums = PartSums(1, device=self._device)
        self._norms: dict[int, Tensor] = {}
        self._in_pieces = False
        self._listening = False
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
        self._sums = PartSums(dp_size, device=self._device, layers=self._layer_sums.names)

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
            raise RuntimeError(IN_PIECES)
        self._sums.join(num_examples, weight)
        self._sums.close(self._layer_sums.of(sorted(self._norms.items())))
        self._norms.clear()

    def collect(self) -> Tensor:
        """This rank's share of the sums."""
        grads = gradients_of(self._parameters)
        # Every rank holds the reduced gradient; a dp-th of each one's norm makes all ranks use the same bits.
        dp_size = self._sums.dp_size
        grad_sq = self._layer_sums.of([(index, norms(grad)) for index, grad in grads]) / dp_size
        l1 = gathered([norms(grad, 1) for _, grad in grads], self._device).sum() / dp_size if self._record_l1 else None
        return self._sums.numbers(grad_sq, grad_l1=l1)

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the sums over all ranks."""
        return self._sums.moments(totals)

    def remove(self) -> None:
        """Takes every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
