"""What every probe offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypedDict, Unpack

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


class Probe(ABC):
    """Reads, while a step runs, how much its partial gradients disagree.

    A step calls ``start``, then ``begin_part`` and ``end_part`` around the backward of each micro-batch of this rank,
    then ``collect`` once the gradient is reduced. The numbers collected are summed over the ranks by the caller, in one
    reduction with its own, and handed to ``moments``.

    Attributes:
        gives: what the moments contain.
        measured: the parameters whose ``grad``, all together, is the gradient that the moments are of. None if the
            moments are of another one, such as the mean over workers that step alone.
    """

    gives: Needs
    measured: Sequence[Tensor] | None = None

    @abstractmethod
    def start(self, dp_size: int) -> None:
        """A probed step begins."""

    @abstractmethod
    def begin_part(self, num_examples: int | None = None) -> None:
        """The backward of a micro-batch begins, which holds so many examples, whatever they count for."""

    @abstractmethod
    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended; the micro-batch's mean loss entered this rank's gradient with ``weight``.

        ``num_examples`` it counts for; a fraction where micro-batches are weighed by their tokens. The weights of all
        ranks and micro-batches add up to the number of ranks. A micro-batch of weight 0 counts for nothing, and is no
        part; its backward may have been left out, and ``begin_part`` with it.
        """

    @abstractmethod
    def collect(self) -> Tensor:
        """This rank's numbers, shape (k,), float64, on the gradient's device; no host sync."""

    @abstractmethod
    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the numbers of all ranks, summed."""

    @abstractmethod
    def stop(self) -> None:
        """What began with ``start`` is broken off, at whatever point: nothing is measured until the next ``start``."""

    @abstractmethod
    def remove(self) -> None:
        """Takes every hook off the model."""
