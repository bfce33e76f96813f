"""The micro-batch probe: the squared norm of every micro-batch's gradient on every rank, by tensor hooks.

A hook on a parameter sees the gradient of one backward on one rank, before it is accumulated, and before anything is
reduced over the ranks; for a tied weight it sees the sum of all its uses. So it serves plain models, DDP and ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from weakref import finalize

from torch import Tensor

from adabatch.arguments import checked
from adabatch.batch.moments import GradientMoments
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.ownership import called_weakly, remove_all
from adabatch.runtime.probes.coordinates import SINGLE
from adabatch.runtime.probes.gauge import Gauge
from adabatch.runtime.probes.layers import Layers
from adabatch.runtime.probes.metrics import ProbeNorm
from adabatch.runtime.probes.norms import gradients_of
from adabatch.runtime.probes.protocol import Probe

IN_PIECES = (
    "a parameter's gradient came in several pieces in one backward, whose norms do not add up: layers used twice under "
    "torch.utils.checkpoint need use_reentrant=False"
)


class MicroBatchProbe(Probe):
    """Noise and signal from micro-batches: each is a part, on each rank and in each accumulation step.

    It costs one pass over the gradients of each micro-batch and one over the step's gradient, a Python call a parameter
    and a few scalars of memory. Measured before clipping, in the gradient that the optimizer will see.

    Args:
        parameters: those whose gradients are measured; the ones that do not require a gradient are left out.
        record_l1: measure the l1 norm of the step's gradient too, in one more pass over it.
        layers: measure each of them as well; costs nothing but 16 bytes a layer in the reduction.
        norm: of noise and signal, the Euclidean one by default: a ``Metric`` such as ``AdamMetric(optimizer)`` or
            ``SpectralNorm(optimizer)``, or "sign". What they cost is told by ``NoiseScale``.
        quantile: also measure this quantile over coordinates, for ``CoordinateNormTest``, which tells what it costs.
        collectives: of the data-parallel ranks, over which coordinates are added up for "sign" and for a quantile;
            ``collectives_of(model)``. Not needed on one rank, or for anything else.
        grad_sq: where the squared norm of the step's gradient comes from, the same on all ranks, shape (), when the
            parameters do not hold it once it is reduced (ZeRO keeps shards of it). The norm is then all that is known.

    Raises:
        ValueError: no parameter requires a gradient, or one that does is in no layer; more asked for than ``grad_sq``
            gives.
    """

    @checked
    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        record_l1: bool = False,
        layers: Layers | None = None,
        norm: ProbeNorm | None = None,
        quantile: float | None = None,
        collectives: Collectives = SINGLE,
        grad_sq: Callable[[], Tensor] | None = None,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise ValueError(
                "the model has no parameter that requires a gradient: there is nothing to train or measure"
            )
        options = {"record_l1": record_l1, "layers": layers, "norm": norm, "quantile": quantile}
        asked = [name for name, value in options.items() if value]
        if grad_sq is not None and asked:
            raise ValueError(
                f"{', '.join(asked)} cannot be measured where the step's gradient is known by its norm only, as with "
                f"DeepSpeed's ZeRO 1 to 3: use ZeRO 0, DDP or FSDP2, or a criterion in the Euclidean norm, such as "
                f"NormTest or NoiseScale()"
            )
        self._gauge = Gauge(
            self._parameters,
            owner=self,
            device=self._parameters[0].device,
            whole_parts=True,
            same=collectives,
            record_l1=record_l1,
            layers=layers,
            norm=norm,
            quantile=quantile,
        )
        self.gives = self._gauge.gives
        self.measured = self._parameters if grad_sq is None else None
        self._ranks = collectives
        self._squares: dict[int, Tensor] = {}
        self._grams: dict[int, Tensor] = {}
        self._grad_sq = grad_sq
        self._norms: dict[int, Tensor] = {}
        self._in_pieces = False
        self._listening = False
        listen = called_weakly(self._listen)
        self._handles = [
            p.register_hook(partial(listen, index))  # type: ignore[no-untyped-call]
            for index, p in enumerate(self._parameters)
        ]
        finalize(self, remove_all, self._handles).atexit = False  # a probe that is dropped leaves nothing behind

    def _listen(self, index: int, grad: Tensor) -> None:
        if self._listening:
            self._in_pieces |= index in self._norms
            self._norms[index] = self._gauge.norms(index, grad)
            if self._gauge.coordinates is not None:
                self._squares[index] = self._gauge.coordinates.squared(grad)
            if self._gauge.matrices is not None and (gram := self._gauge.matrices.squared(index, grad)) is not None:
                self._grams[index] = gram

    def start(self, dp_size: int) -> None:
        """A probed step begins.

        Raises:
            ValueError: coordinates or matrices are to be measured on several ranks, and no collectives over them were
                given.
        """
        squared = "coordinates" if self._gauge.coordinates is not None else "matrices"
        if (self._gauge.coordinates or self._gauge.matrices) is not None and self._ranks.size != dp_size:
            raise ValueError(
                f"the squares of {squared} are to be added up over {dp_size} ranks, and the probe was given "
                f"collectives over {self._ranks.size}: use MicroBatchProbe(..., collectives=collectives_of(model))"
            )
        self._gauge.start(dp_size)

    def begin_part(self, num_examples: int | None = None) -> None:
        self._norms.clear()
        self._squares.clear()
        self._grams.clear()
        self._in_pieces = False
        self._listening = True

    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended. ``weight`` is the micro-batch's share of this rank's gradient.

        Raises:
            RuntimeError: the backward reached no parameter, or one in several pieces.
        """
        self._listening = False
        if not self._norms and weight:
            raise RuntimeError(
                "the backward of this micro-batch reached no parameter: is the loss computed from the model that was "
                "given to AdaptiveBatch, and not detached?"
            )
        if self._in_pieces:
            raise RuntimeError(IN_PIECES)
        sums, coordinates = self._gauge.sums, self._gauge.coordinates
        sums.join(num_examples, weight)
        while self._squares and coordinates is not None:
            coordinates.add(*self._squares.popitem(), sums.share)
        first = 1 / weight if sums.num_parts == 0 and weight else None
        while self._grams and self._gauge.matrices is not None:
            self._gauge.matrices.add(*self._grams.popitem(), sums.share, first)
        self._gauge.close(sorted(self._norms.items()))
        self._norms.clear()

    def collect(self) -> Tensor:
        if self._grad_sq is not None:
            return self._gauge.sums.numbers(self._grad_sq().view(1) / self._gauge.sums.dp_size)
        return self._gauge.collect(gradients_of(self._parameters), holders=self._gauge.sums.dp_size)

    def moments(self, totals: list[float]) -> GradientMoments:
        return self._gauge.moments(totals)

    def stop(self) -> None:
        self._listening = False
        self._norms.clear()
        self._squares.clear()
        self._grams.clear()

    def remove(self) -> None:
        remove_all(self._handles)
