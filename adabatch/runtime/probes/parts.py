"""A rank's share of what a step's parts add up to: what the probes collect, and the moments that come of it.

A part is what a probe sees at once: a micro-batch, or, where it looks at a reduction, everything that the rank
accumulated since the one before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adabatch.batch.moments import EUCLIDEAN, GradientMoments, from_matrices, from_signs


class PartSums:
    """This rank's share of a step's sums over parts.

    With ``g_m`` the mean gradient of a micro-batch of ``n_m`` examples and ``w_m`` its weight in this rank's gradient,
    a part shows ``sum_m w_m g_m``. With ``W`` the sum of those weights, that is ``W g`` for a part with the mean
    gradient ``g`` of ``1 / sum_m (w_m / W)^2 / n_m`` examples, whose weight in the step is ``W / dp_size``.

    Args:
        dp_size: data-parallel ranks.
        device: of the gradients' norms.
        layers: names of the layers whose sums are taken apart; none for those of all parameters together.
        examples: parts are single examples, and what is shown of a micro-batch is ``W^2`` times their mean square.
        norm: of the sums. For "sign" those of the parts are of deviations, and those of the gradient l1 norms; for
            "spectral" those of the parts are of roots of Gram matrices, and those of the gradient nuclear norms.
        known: whether the norm is known in this step; where it is not, there are no parts in it, and no noise.
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
    ) -> None:
        self.dp_size = dp_size
        self.num_parts = 0
        self.num_empty = 0  # micro-batches that count for nothing: no parts, but seen
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
        self._lengths: dict[str, int] = {}

    def join(self, num_examples: float, weight: float) -> None:
        """A micro-batch enters the part that is open; one of weight 0 changes nothing in it."""
        if weight == 0:
            self.num_empty += 1
            return
        self._weight += weight
        self._spread += weight * weight / num_examples

    @property
    def share(self) -> float:
        """What squares that the open part shows are multiplied by in the sums."""
        return 1 / (self._weight * self.dp_size) if self._weight else 0.0

    def close(self, seen_sq: Tensor | None) -> None:
        """The open part ends: ``seen_sq``, shape (num_layers,), were the squared norms of what it showed.

        None where the sums over parts are given to ``numbers``. Nothing is added where all that entered weighs 0.
        """
        if self._weight == 0:
            return
        if seen_sq is not None:
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
        """What the ranks add up, shape (k,): few float64 numbers.

        Args:
            grad: this rank's share of the squared norms of the step's gradient, or of its l1 norms, shape
                (num_layers,).
            parts: its share of the sums over parts, shape (num_layers,), where parts were closed without.
            first: norms of the gradient of its first part, shape (num_layers,), where they were taken ("spectral").
            others: its share of other sums by their name, shape (); None where not measured. Of these ``moments`` reads
                ``grad_l1``, ``grad_l2_sq``, and ``ratio``, the quantile over coordinates.

        Raises:
            RuntimeError: no part was seen.
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
            "num_parts": self._part_sq.new_full((1,), self.num_parts),
            "inverse_part_size": self._part_sq.new_full((1,), self._inverse_part_size),
            "inverse_num_examples": self._part_sq.new_full((1,), self._inverse_num_examples),
            **({} if first is None else self._of_first(first)),
            **{name: value.view(1) for name, value in others.items() if value is not None},
        }
        self._lengths = {name: len(value) for name, value in named.items()}
        return torch.cat([value.to(self._part_sq) for value in named.values()])

    def _of_first(self, norms: Tensor) -> dict[str, Tensor]:
        """What is added up of first parts; a rank all of whose micro-batches weigh nothing has none."""
        found = self._part_sq.new_full((1,), self.num_parts > 0)
        return {"first": norms, "num_first": found, "inverse_first_size": found / self._first_size}

    def named(self, totals: list[float]) -> dict[str, list[float]]:
        """The numbers of all ranks, added up, by the names that they have in ``numbers``."""
        rest = iter(totals)
        return {name: [next(rest) for _ in range(length)] for name, length in self._lengths.items()}

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the numbers of all ranks, added up."""
        found = self.named(totals)
        num_examples = 1 / found["inverse_num_examples"][0]
        part_size = 1.0 if self._examples else 1 / found["inverse_part_size"][0]
        num_parts = round(num_examples if self._examples else found["num_parts"][0])

        firsts = found.get("first", [0.0] * len(found["parts"]))

        def moments_of(parts: float, grad: float, first: float) -> GradientMoments:
            counted = num_parts if self._known else 0
            sizes = {"part_size": part_size, "num_examples": num_examples}
            if self._norm == "sign":
                return from_signs(parts, grad, num_parts=counted, **sizes)
            if self._norm == "spectral":
                ranks, inverse = found["num_first"][0], found["inverse_first_size"][0]
                return from_matrices(
                    parts, grad, first=first / ranks, first_size=ranks / inverse, num_parts=counted, **sizes
                )
            return GradientMoments(parts, part_size, grad, num_examples, counted, norm=self._norm)

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
            # Of a deviation of parts; what the noise of examples is to it does not depend on the coordinate.
            times = GradientMoments(1.0, part_size, 0.0, num_examples, num_parts).noise
            others["noise_at_quantile"] = found["ratio"][0] * times * whole.grad_sq
        return whole._replace(**others)
