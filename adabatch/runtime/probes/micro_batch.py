"""The micro-batch probe: the squared norm of every micro-batch's gradient on every rank, from tensor hooks.

A hook on a parameter sees the gradient of one backward on one rank, before it is accumulated and before it is reduced
over the ranks. For a tied weight it sees the sum over all uses. Therefore the probe works with plain models, DDP and
ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from weakref import finalize

from torch import Tensor

from adabatch.arguments import checked
from adabatch.batch.moments import GradientMoments
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.optimizers.ownership import called_weakly, remove_all
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
    """Noise and signal from micro-batches: each micro-batch on each rank is a part.

    The probe makes one pass over the gradients of each micro-batch and one over the step's gradient. It costs one
    Python call per parameter and backward, and a few scalars of memory. Gradients are measured before clipping.

    Args:
        parameters: the parameters whose gradients are measured; those that do not require a gradient are ignored.
        record_l1: also measure the l1 norm of the step's gradient, in another pass over it.
        layers: also measure each of these layers, at 16 bytes per layer in the reduction.
        norm: the norm of noise and signal: a ``Metric`` such as ``AdamMetric(optimizer)`` or
            ``SpectralNorm(optimizer)``, or "sign"; by default the Euclidean norm. ``NoiseScale`` states the costs.
        quantile: also measure this quantile over coordinates, for ``CoordinateNormTest``, which states the cost.
        collectives: the data-parallel ranks (``collectives_of(model)``), over which squares are summed for "sign",
            "spectral" and quantiles on several ranks; not needed otherwise.
        grad_sq: returns the squared norm of the step's gradient, shape (), the same on all ranks. For engines whose
            parameters do not hold the reduced gradient (ZeRO keeps shards of it). Nothing else of the gradient can then
            be measured.

    Raises:
        ValueError: if no parameter requires a gradient, if one that does is in no layer, or if other options are
            combined with ``grad_sq``.
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
                f"{', '.join(asked)} cannot be measured if only the norm of the step's gradient is known, as with "
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
        # Not at exit, when torch may be partly torn down and there is nothing left to clean up for.
        finalize(self, remove_all, self._handles).atexit = False  # a probe that is dropped leaves nothing behind

    def _listen(self, index: int, grad: Tensor) -> None:
        if self._listening:
            # A second call in one backward: the gradient comes in pieces. end_part raises, once the backward is over.
            self._in_pieces |= index in self._norms
            self._norms[index] = self._gauge.norms(index, grad)
            if self._gauge.coordinates is not None:
                self._squares[index] = self._gauge.coordinates.squared(grad)
            if self._gauge.matrices is not None and (gram := self._gauge.matrices.squared(index, grad)) is not None:
                self._grams[index] = gram

    def start(self, dp_size: int) -> None:
        """Begins to measure a step on ``dp_size`` data-parallel ranks.

        Raises:
            ValueError: if coordinates or matrices are measured on several ranks, but the probe was not given
                collectives over them.
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
        """Called after the backward of a micro-batch; see `Probe.end_part`.

        Raises:
            RuntimeError: if the backward reached no parameter, or delivered a gradient in several pieces.
        """
        self._listening = False
        if not self._norms and weight:
            raise RuntimeError(
                "the backward of this micro-batch reached no parameter: is the loss computed from the model that was "
                "given to AdaptiveBatch, and not detached? A probe of your own must be made from the parameters of "
                "that model; for FSDP2, take a ReduceScatterProbe"
            )
        if self._in_pieces:
            raise RuntimeError(IN_PIECES)
        sums, coordinates = self._gauge.sums, self._gauge.coordinates
        sums.join(num_examples, weight)
        # Added here and not in the hook, which runs before the weight is known. popitem() frees each gradient's squares
        # as soon as they are added.
        while self._squares and coordinates is not None:
            coordinates.add(*self._squares.popitem(), sums.share)
        first = 1 / weight if sums.num_parts == 0 and weight else None
        while self._grams and self._gauge.matrices is not None:
            self._gauge.matrices.add(*self._grams.popitem(), sums.share, first)
        # Hooks run in the order of the backward. In the order of the parameters, LayerSums finds the index that it
        # made in the first step, whatever branch the backward took.
        self._gauge.close(sorted(self._norms.items()))
        self._norms.clear()

    def collect(self) -> Tensor:
        if self._grad_sq is not None:
            # Every rank passes an equal share of a number that all know, so that one sum serves all numbers.
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
