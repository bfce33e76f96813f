"""What every probe offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypedDict, Unpack

from torch import Tensor

from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.runtime.probes.layers import Layers
from adabatch.runtime.probes.metrics import ProbeNorm, norm_name


class ProbeOptions(TypedDict, total=False):
    """What a probe can measure besides noise and signal; each probe describes the options that it takes.

    Args:
        record_l1: measure the l1 norm of the step's gradient.
        layers: measure the noise and signal of each of these layers.
        norm: the norm of noise and signal; by default the Euclidean one.
        quantile: the quantile, over coordinates, of the noise of a coordinate over its squared gradient.
    """

    record_l1: bool
    layers: Layers | None
    norm: ProbeNorm | None
    quantile: float | None


def given_with(**options: Unpack[ProbeOptions]) -> Needs:
    """The statistics that a probe with these options gives."""
    norm = options.get("norm")
    return Needs(
        noise=norm_name(norm),
        quantile=options.get("quantile"),
        # The signal in this norm is the squared l1 norm, so from_signs() reports the l1 norm at no extra cost.
        l1=bool(options.get("record_l1")) or norm == "sign",
        layers=options.get("layers") is not None,
    )


class Probe(ABC):
    """Measures, while a step runs, how much its partial gradients disagree.

    A step calls ``start``, then ``begin_part`` and ``end_part`` around the backward of each micro-batch of this rank,
    then ``collect`` once the gradient is reduced. The caller sums the collected numbers over the ranks, in the same
    reduction as its own numbers, and passes the sums to ``moments``.

    Attributes:
        gives: the statistics that the moments contain.
        measured: the parameters whose ``grad`` tensors form the gradient that the moments describe. None if they
            describe another gradient, such as the mean over workers that step alone.
    """

    gives: Needs
    measured: Sequence[Tensor] | None = None

    @abstractmethod
    def start(self, dp_size: int) -> None:
        """Begins to measure a step on ``dp_size`` data-parallel ranks."""

    @abstractmethod
    def begin_part(self, num_examples: int | None = None) -> None:
        """Called before the backward of a micro-batch.

        Args:
            num_examples: examples in the micro-batch, whatever their weight; None if unknown.
        """

    @abstractmethod
    def end_part(self, num_examples: float, weight: float) -> None:
        """Called after the backward of a micro-batch.

        Args:
            num_examples: examples that the micro-batch counts as; a fraction if micro-batches are weighted by tokens.
            weight: the weight of the micro-batch's mean loss in this rank's gradient. The weights of all ranks and
                micro-batches sum to the number of ranks. A micro-batch of weight 0 is not a part; its backward, and
                with it ``begin_part``, may have been skipped.
        """

    @abstractmethod
    def collect(self) -> Tensor:
        """This rank's numbers, shape (k,), float64, on the gradient's device. Does not sync with the host."""

    @abstractmethod
    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments, from the sums of all ranks' numbers.

        With ``Measure(late=True)`` it is called for the sums of an earlier step, when another one is under way or was
        stopped. It must therefore depend on the sums and on the settings of the probe only.
        """

    @abstractmethod
    def stop(self) -> None:
        """Abandons the step, at any point of it. Nothing is measured until the next ``start``."""

    @abstractmethod
    def remove(self) -> None:
        """Removes every hook from the model."""
