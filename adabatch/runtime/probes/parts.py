"""The sums over the parts of a step that a rank contributes, and the moments that follow from them.

A part is the gradient that a probe sees at once: that of a micro-batch, or, for a probe that observes reductions,
everything that the rank has accumulated since the previous reduction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adabatch.batch.moments import EUCLIDEAN, GradientMoments, from_matrices, from_signs


class PartSums:
    """This rank's share of a step's sums over parts.

    Let ``g_m`` be the mean gradient of a micro-batch of ``n_m`` examples, and ``w_m`` its weight in this rank's
    gradient. The probe then sees ``sum_m w_m g_m`` of a part. With ``W = sum_m w_m`` this is ``W g``, where ``g`` is
    the mean gradient of a part of ``1 / sum_m (w_m / W)^2 / n_m`` examples, whose weight in the step is
    ``W / dp_size``.

    Args:
        dp_size: data-parallel ranks.
        device: the device of the gradients' norms.
        layers: names of the layers that are summed separately; empty for one sum over all parameters.
        examples: whether parts are single examples. The probe then passes ``W^2`` times their mean square.
        norm: the norm of the sums. For "sign", the sums over parts are of deviations and those of the gradient are l1
            norms; for "spectral", they are of roots of Gram matrices and nuclear norms.
        known: whether the norm is known in this step. If not, the step has no parts and its noise is NaN.
        lengths: those of the sums of an earlier step with the same settings, so that ``moments`` can still be called
            for its totals.
    """

    def __init__(
        self,
        dp_size: int,
        *,
        device: torch.device,
        layers: tuple[str, ...] = (),
        examples: bool = False,
        norm: str = EUCLIDEAN,
        known: bool = True,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        self.dp_size = dp_size
        self.num_parts = 0
        self.num_empty = 0  # micro-batches of weight 0: not parts, but proof that the loop ran
        self._examples = examples
        self._norm = norm
        self._known = known
        self._layers = layers
        self._part_sq = torch.zeros(max(1, len(layers)), dtype=torch.float64, device=device)
        self._inverse_part_size = 0.0
        self._inverse_num_examples = 0.0
        self._weight = 0.0
        self._spread = 0.0
        self._first_size = math.inf  # examples in the first part
        self.lengths: Mapping[str, int] = lengths or {}

    def join(self, num_examples: float, weight: float) -> None:
        """Adds a micro-batch to the open part; one of weight 0 is only counted."""
        if weight == 0:
            self.num_empty += 1
            return
        self._weight += weight
        self._spread += weight * weight / num_examples

    @property
    def share(self) -> float:
        """The factor by which squares of the open part enter the sums."""
        return 1 / (self._weight * self.dp_size) if self._weight else 0.0

    def close(self, seen_sq: Tensor | None) -> None:
        """Ends the open part.

        Args:
            seen_sq: squared norms of ``sum_m w_m g_m``, shape (num_layers,); None if the sums over parts are passed to
                ``numbers`` instead.
        """
        # Only micro-batches of weight 0: they would divide by zero below.
        if self._weight == 0:
            return
        if seen_sq is not None:
            # The probe saw W g, and |g|^2 counts W / dp_size times: (W / dp_size) |W g|^2 / W^2. One division does
            # both.
            self._part_sq += seen_sq / (self._weight * self.dp_size)
        if self.num_parts == 0:
            self._first_size = self._weight * self._weight / self._spread
        self._inverse_part_size += self._spread / (self._weight * self.dp_size)
        self._inverse_num_examples += self._spread / self.dp_size**2
        self.num_parts += 1
        self._weight = self._spread = 0.0

    def numbers(
        self, grad: Tensor, *, parts: Tensor | None = None, first: Tensor | None = None, **others: Tensor | None
    ) -> Tensor:
        """This rank's numbers for the sum over ranks, float64, shape (k,).

        Args:
            grad: this rank's share of the squared norms (or of the l1 or nuclear norms) of the step's gradient, shape
                (num_layers,).
            parts: this rank's share of the sums over parts, shape (num_layers,), if parts were closed without them.
            first: norms of the gradient of this rank's first part, shape (num_layers,); "spectral" only.
            others: this rank's share of other sums by name, shape (); None if not measured. ``moments`` reads
                ``grad_l1``, ``grad_l2_sq``, and ``ratio``, the quantile over coordinates.

        Raises:
            RuntimeError: if no part was seen.
        """
        if self.num_parts + self.num_empty == 0:
            raise RuntimeError(
                "no gradient was reduced in this step: is the loss computed from the model that the probe was made "
                "for, not detached, and the gradient synchronized in the last micro-batch?"
            )
        # new_full() fills on the device; a tensor of host numbers would be copied there, and the copy waited for.
        named = {
            "parts": self._part_sq if parts is None else parts,
            "grad": grad,
            # none if the norm is unknown: said by the totals, which may be read when the norm of a later step is known
            "num_parts": self._part_sq.new_full((1,), self.num_parts * self._known),
            "inverse_part_size": self._part_sq.new_full((1,), self._inverse_part_size),
            "inverse_num_examples": self._part_sq.new_full((1,), self._inverse_num_examples),
            **({} if first is None else self._of_first(first)),
            **{name: value.view(1) for name, value in others.items() if value is not None},
        }
        # All ranks measure the same things, so this rank's lengths also cut up the sums.
        self.lengths = {name: len(value) for name, value in named.items()}
        return torch.cat([value.to(self._part_sq) for value in named.values()])

    def _of_first(self, norms: Tensor) -> dict[str, Tensor]:
        """The sums over first parts; a rank whose micro-batches all have weight 0 contributes zeros."""
        found = self._part_sq.new_full((1,), self.num_parts > 0)
        return {"first": norms, "num_first": found, "inverse_first_size": found / self._first_size}

    def named(self, totals: list[float]) -> dict[str, list[float]]:
        """The sums over all ranks by their names in ``numbers``."""
        rest = iter(totals)
        return {name: [next(rest) for _ in range(length)] for name, length in self.lengths.items()}

    def moments(self, totals: list[float]) -> GradientMoments:
        """The moments from the sums over all ranks, of this step or of an earlier one with the same settings."""
        found = self.named(totals)
        num_examples = 1 / found["inverse_num_examples"][0]
        part_size = 1.0 if self._examples else 1 / found["inverse_part_size"][0]
        # With weights, num_examples is the effective number of examples, which need not be whole.
        counted = round(found["num_parts"][0])
        num_parts = round(num_examples) if self._examples and counted else counted

        firsts = found.get("first", [0.0] * len(found["parts"]))

        def moments_of(parts: float, grad: float, first: float) -> GradientMoments:
            sizes = {"part_size": part_size, "num_examples": num_examples}
            if self._norm == "sign":
                return from_signs(parts, grad, num_parts=num_parts, **sizes)
            if self._norm == "spectral":
                ranks, inverse = found["num_first"][0], found["inverse_first_size"][0]
                return from_matrices(
                    parts, grad, first=first / ranks, first_size=ranks / inverse, num_parts=num_parts, **sizes
                )
            return GradientMoments(parts, part_size, grad, num_examples, num_parts, norm=self._norm)

        whole = moments_of(sum(found["parts"]), sum(found["grad"]), sum(firsts))
        others: dict[str, Any] = {}
        if self._layers:
            sums = zip(self._layers, found["parts"], found["grad"], firsts, strict=True)
            others["layers"] = {name: moments_of(*each) for name, *each in sums}
        if "grad_l1" in found:
            others["grad_l1"] = found["grad_l1"][0]
        if "grad_l2_sq" in found:
            others["grad_l2"] = math.sqrt(found["grad_l2_sq"][0])
        if "ratio" in found:
            # The ratio is of the variance of parts. The factor that makes it the noise of examples is the same for all
            # coordinates, so it can be applied to the quantile: it is the noise for part_sq - grad_sq = 1.
            times = GradientMoments(1.0, part_size, 0.0, num_examples, num_parts).noise
            others["noise_at_quantile"] = found["ratio"][0] * times * whole.grad_sq
        return whole._replace(**others)
