"""What every probe offers."""

from __future__ import annotations

from typing import Protocol, TypedDict, Unpack, runtime_checkable

from torch import Tensor

from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.runtime.probes.layers import Layers
from adabatch.runtime.probes.metrics import ProbeNorm, name_of


class ProbeOptions(TypedDict, total=False):
    """What a probe can be asked to measure beside noise and signal; each is described where it is taken.

    Args:
        record_l1: the l1 norm of the step's gradient.
        layers: noise and signal of each of them.
        norm: of noise and signal; the Euclidean one by default.
        quantile: over coordinates, of their noise over their squared gradient.
    """

    record_l1: bool
    layers: Layers | None
    norm: ProbeNorm | None
    quantile: float | None


def given_with(**options: Unpack[ProbeOptions]) -> Needs:
    """What a probe with these options gives."""
    norm = options.get("norm")
    return Needs(
        noise=name_of(norm),
        quantile=options.get("quantile"),
        l1=bool(options.get("record_l1")) or norm == "sign",
        layers=options.get("layers") is not None,
    )


@runtime_checkable
class Probe(Protocol):
    """Reads, while a step runs, how much its partial gradients disagree.

    A step calls ``start``, then ``begin_part`` and ``end_part`` around the backward of each micro-batch of this rank,
    then ``collect`` once the gradient is reduced. The numbers collected are summed over the ranks by the caller, in one
    reduction with its own, and handed to ``moments``.
    """

    @property
    def gives(self) -> Needs:
        """What the moments contain."""
        ...

    def start(self, dp_size: int) -> None:
        """A probed step begins."""
        ...

    def begin_part(self) -> None:
        """The backward of a micro-batch begins."""
        ...

    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended; the micro-batch's mean loss entered this rank's gradient with ``weight``.

        ``num_examples`` it counts for; a fraction where micro-batches are weighed by their tokens. The weights of all
        ranks and micro-batches add up to the number of ranks.
        """
        ...

    def collect(self) -> Tensor:
        """This rank's numbers, shape (k,), float64, on the gradient's device; no host sync."""
        ...

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the numbers of all ranks, summed."""
        ...

    def stop(self) -> None:
        """What began with ``start`` is broken off, at whatever point: nothing is measured until the next ``start``."""
        ...

    def remove(self) -> None:
        """Takes every hook off the model."""
        ...
