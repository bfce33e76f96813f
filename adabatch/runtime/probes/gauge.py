"""What all probes have in common: measuring gradients in a norm, per layer and per coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from adabatch.arguments import require
from adabatch.batch.moments import GradientMoments
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.probes.coordinates import SINGLE, CoordinateSquares
from adabatch.runtime.probes.layers import LayerSums
from adabatch.runtime.probes.matrices import MatrixGrams
from adabatch.runtime.probes.metrics import Image, SpectralNorm, as_it_is, begun, check_diagonal, norm_name
from adabatch.runtime.probes.norms import gathered, norms, sum_of_squares
from adabatch.runtime.probes.parts import PartSums
from adabatch.runtime.probes.protocol import ProbeOptions, given_with


class Gauge:
    """Measures a step's parts and its gradient.

    Args:
        parameters: the measured parameters. Their positions are the parameter numbers below.
        owner: the probe, for error messages.
        device: the device of the sums.
        whole_parts: whether the probe sees the whole gradient of a part, so that any metric can be applied to it. If
            not, it sees sums of squares of coordinates only.
        same: ranks that hold the same coordinates and see different parts.
        others: ranks that hold the other coordinates.
        examples: whether parts are single examples.
        options: what to measure.

    Raises:
        ValueError: if a parameter is in no layer, or if a metric mixes coordinates but ``whole_parts`` is False.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        owner: object,
        device: torch.device,
        whole_parts: bool = False,
        same: Collectives = SINGLE,
        others: Collectives = SINGLE,
        examples: bool = False,
        **options: Unpack[ProbeOptions],
    ) -> None:
        norm, quantile = options.get("norm"), options.get("quantile")
        require(quantile is None or 0 < quantile <= 1, "quantile must be above 0 and at most 1.0", quantile)
        if not whole_parts:
            check_diagonal(norm, type(owner).__name__)
        self.gives = given_with(**options)
        self.layer_sums = LayerSums(parameters, options.get("layers"), device=device)
        # Empty until the first start(), which knows the number of ranks.
        self.sums = PartSums(1, device=device)
        self.coordinates: CoordinateSquares | None = None
        # "sign" adds up the root of every coordinate's variance, which no norm of a whole part gives.
        by_squares = norm == "sign" or (norm is not None and not whole_parts)
        if by_squares or quantile is not None:
            self.coordinates = CoordinateSquares(
                parameters,
                self.layer_sums,
                device=device,
                norm=norm if by_squares else None,
                quantile=quantile,
                same=same,
                others=others,
            )
        self.matrices: MatrixGrams | None = None
        if isinstance(norm, SpectralNorm):
            self.matrices = MatrixGrams(parameters, self.layer_sums, device=device, takes=norm.takes, same=same)
        self.parts_are_norms = not by_squares and self.matrices is None
        self._parameters = parameters
        self._device = device
        self._examples = examples
        self._norm = norm
        self._image: Image = as_it_is
        self._record_l1 = options.get("record_l1", False)

    def start(self, dp_size: int) -> None:
        """Begins to measure a step."""
        self._image, known = begun(self._norm, self._parameters)
        self.sums = PartSums(
            dp_size,
            device=self._device,
            layers=self.layer_sums.names,
            examples=self._examples,
            norm=norm_name(self._norm),
            known=known,
            lengths=self.sums.lengths,
        )
        for sums in (self.coordinates, self.matrices):
            if sums is not None:
                sums.start()

    def norms(self, number: int, grad: Tensor) -> Tensor:
        """Norms of the blocks of a gradient, shape (num_blocks,): Euclidean norms of its image, or l1 norms."""
        if self._norm == "sign":
            return norms(grad, 1)
        return norms(self._image(self._parameters[number], grad))

    def close(self, seen: Sequence[tuple[int, Tensor]], power: int = 2, factor: float = 1.0) -> None:
        """Ends the open part.

        Args:
            seen: pairs of a parameter's number and the norms of its blocks in this part. Ignored if the sums over parts
                come from squares of coordinates or from Gram matrices.
            power: the power that turns ``seen`` into squared norms: 2, or 1 if they are squares already.
            factor: multiplies the squares.
        """
        self.sums.close(self.layer_sums.of(seen, power) * factor if self.parts_are_norms else None)

    def collect(self, grads: Sequence[tuple[int, Tensor]], *, holders: int, **others: Tensor) -> Tensor:
        """This rank's share of the sums.

        Args:
            grads: pairs of a parameter's number and this rank's piece of the step's gradient.
            holders: how many ranks hold the same piece. Each contributes an equal share of its norm, so that all
                continue with the same bits.
            others: shares of other sums, shape ().
        """
        parts = ratio = l1 = l2_sq = first = None

        if self.coordinates is not None:
            parts, ratio = self.coordinates.numbers(grads, self._image)
        lengths, l1_pieces, l2_pieces = [], [], []
        for number, grad in grads:  # all of one gradient while it is in the caches, not one pass for each norm
            lengths.append((number, self.norms(number, grad)))
            if self._record_l1:
                l1_pieces.append(norms(grad, 1))
            if self._norm is not None:
                l2_pieces.append(norms(grad))
        if self._record_l1:
            l1 = gathered(l1_pieces, self._device).sum() / holders
        if self._norm is not None:
            # For the journal, which records the Euclidean norm whatever the noise is measured in.
            l2_sq = sum_of_squares(l2_pieces, self._device) / holders
        if self.matrices is None:
            whole = self.layer_sums.of(lengths, 1 if self._norm == "sign" else 2) / holders
        else:
            parts, whole, first = self.matrices.numbers(grads, self.sums.num_parts)
        return self.sums.numbers(whole, parts=parts, first=first, ratio=ratio, grad_l1=l1, grad_l2_sq=l2_sq, **others)

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the sums over all ranks."""
        return self.sums.moments(totals)
