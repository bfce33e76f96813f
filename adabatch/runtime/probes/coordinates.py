"""Squares of every coordinate of the gradient, summed over the parts of a step.

With ``S_c = sum_j w_j g_jc^2`` over the parts and the step's gradient ``g_c``, ``D_c = S_c - g_c^2`` is the variance of
the parts in coordinate c, up to a factor that is the same for all coordinates. The coordinate-wise norm test and the l1
norm of sign methods need it. Its rounding error is 1e-7 of ``S_c`` in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.probes.layers import LayerSums
from adabatch.runtime.probes.metrics import Image, ProbeNorm
from adabatch.runtime.probes.norms import norms, real, sum_dtype
from adabatch.runtime.probes.quantile import LEFT_OUT, quantile_of
from adabatch.runtime.wrappers.fsdp2 import own_piece

SINGLE = Collectives()


class CoordinateNumbers(NamedTuple):
    """This rank's share of sums over coordinates; None for what is not measured.

    Args:
        parts: sums over the parts, shape (num_layers,): squared norms of their images, or ``sum_c sqrt(D_c)`` for
            "sign".
        ratio: the quantile over c of ``D_c / g_c^2``, shape ().
    """

    parts: Tensor | None
    ratio: Tensor | None


class CoordinateSquares:
    """``S_c`` of this rank's coordinates, 4 bytes each (8 in float64) while a probed step runs.

    Args:
        parameters: the measured parameters.
        layer_sums: sums per layer.
        device: the device of the squares.
        norm: the norm of ``parts``: a diagonal metric or "sign"; None for no ``parts``.
        quantile: the quantile of ``ratio``; None for no ``ratio``.
        same: ranks that hold the same coordinates and see different parts. For "sign" and quantiles, which are not
            linear in ``S``, it is summed over them, in a reduction of the size of the gradient.
        others: ranks that hold the other coordinates.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layer_sums: LayerSums,
        *,
        device: torch.device,
        norm: ProbeNorm | None,
        quantile: float | None,
        same: Collectives = SINGLE,
        others: Collectives = SINGLE,
    ) -> None:
        self._parameters = parameters
        self._layer_sums = layer_sums
        self._norm = norm
        self._quantile = quantile
        self._same = same
        self._others = others
        self._lengths = [real(own_piece(p.detach())[0]).numel() for p in parameters]
        self._dtype = sum_dtype(parameters)
        self._device = device
        self._squares: Sequence[Tensor] = ()
        self._flat = torch.zeros(0)

    @property
    def num_bytes(self) -> int:
        """Memory in use at present."""
        return self._flat.numel() * self._flat.element_size()

    def start(self) -> None:
        """Begins a step."""
        # One tensor for all parameters, so that one reduction sums it. Made for each probed step, since it is as large
        # as the model in float32 and most steps are not probed.
        self._flat = torch.zeros(sum(self._lengths), dtype=self._dtype, device=self._device)
        self._squares = torch.split(self._flat, self._lengths)

    def squared(self, grad: Tensor) -> Tensor:
        """The squares of a gradient's coordinates, flat, in the dtype of the sums."""
        dense = real(grad.to_dense() if grad.is_sparse else grad)
        return dense.reshape(-1).to(self._dtype).square()

    def add(self, number: int, squares: Tensor, weight: float) -> None:
        """Adds ``weight`` times the squares, flat, to those of a parameter."""
        self._squares[number].add_(squares.to(self._flat), alpha=weight)

    def numbers(self, grads: Sequence[tuple[int, Tensor]], image: Image) -> CoordinateNumbers:
        """The sums, at the end of a step; frees the squares.

        Args:
            grads: pairs of a parameter's number and this rank's piece of the step's gradient.
            image: the image of the metric.
        """
        parts = ratio = None
        # A diagonal image scales each coordinate, so the image of sqrt(S) has the squared norm that the images of the
        # parts have on average. This is linear in S: the one sum over ranks at the end of the step is enough.
        if self._norm is not None and self._norm != "sign":
            images = ((n, image(self._parameters[n], self._squares[n].sqrt().to(grad.device))) for n, grad in grads)
            parts = self._layer_sums.of([(n, norms(each)) for n, each in images])
        if self._norm == "sign" or self._quantile is not None:
            self._same.sum_in_place(self._flat)
        if self._norm == "sign":
            roots = ((n, norms(spread.sqrt(), 1)) for n, spread, _ in self._spreads(grads))
            # These ranks hold the same sums by now, and each contributes an equal share, so that all continue with the
            # same bits.
            parts = self._layer_sums.of(list(roots), power=1) / self._same.size
        if self._quantile is not None:
            # Every rank gets the whole quantile, and the reduction of the step adds up what the ranks contribute.
            ranks = self._same.size * self._others.size
            ratio = quantile_of(lambda: self._ratios(grads), self._quantile, collectives=self._others) / ranks
        self._squares, self._flat = (), torch.zeros(0)
        return CoordinateNumbers(parts, ratio)

    def _spreads(self, grads: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``D`` and ``g^2`` of each parameter, with its number."""
        for number, grad in grads:
            grad_sq = self.squared(grad).to(self._flat.device)
            # Clamped, since rounding makes the difference of equal numbers slightly negative.
            yield number, (self._squares[number] - grad_sq).clamp_(min=0), grad_sq

    def _ratios(self, grads: Sequence[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """``D / g^2``: infinite if only ``g`` is zero, left out if both are zero."""
        yield self._flat[:0]  # a rank may hold no coordinate at all
        for _, spread, grad_sq in self._spreads(grads):
            nothing = (spread == 0) & (grad_sq == 0)
            yield spread.div_(grad_sq).masked_fill_(nothing, LEFT_OUT)
