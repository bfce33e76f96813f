"""Sums over the parts of one rank, for probes that see a gradient where it is reduced.

What such a probe sees at a reduction is everything that the rank accumulated since the one before: one micro-batch, or
all of a step. That is one part, whatever it was made of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adabatch.batch.moments import GradientMoments


class PartSums:
    """This rank's share of a step's sums over parts.

    With ``g_m`` the mean gradient of a micro-batch of ``n_m`` examples and ``w_m`` its weight in this rank's gradient,
    a reduction shows ``sum_m w_m g_m``. With ``W`` the sum of those weights, that is ``W g`` for a part with the mean
    gradient ``g`` of ``1 / sum_m (w_m / W)^2 / n_m`` examples, whose weight in the step is ``W / dp_size``.

    Args:
        dp_size: data-parallel ranks.
        device: of the gradients' norms.
    """

    def __init__(self, dp_size: int, *, device: torch.device) -> None:
        self.dp_size = dp_size
        self.num_parts = 0
        self._part_sq = torch.zeros((), dtype=torch.float64, device=device)
        self._inverse_part_size = 0.0
        self._inverse_num_examples = 0.0
        self._weight = 0.0
        self._spread = 0.0

    def join(self, num_examples: float, weight: float) -> None:
        """A micro-batch enters the part that is open."""
        self._weight += weight
        self._spread += weight * weight / num_examples

    def close(self, seen_sq: Tensor) -> None:
        """The open part was reduced, and ``seen_sq``, shape (), was its squared norm as it went in."""
        self._part_sq += seen_sq / (self._weight * self.dp_size)
        self._inverse_part_size += self._spread / (self._weight * self.dp_size)
        self._inverse_num_examples += self._spread / self.dp_size**2
        self.num_parts += 1
        self._weight = self._spread = 0.0

    def numbers(self, grad_sq: Tensor, grad_l1: Tensor | None) -> Tensor:
        """What the ranks add up, shape (4,), or (5,) with the l1 norm.

        Args:
            grad_sq, grad_l1: this rank's share of the squared norm and of the l1 norm of the step's gradient, shape ().

        Raises:
            RuntimeError: nothing was reduced.
        """
        if self.num_parts == 0:
            raise RuntimeError(
                "no gradient was reduced in this step: is the loss computed from the model that the probe was made "
                "for, not detached, and the gradient synchronized in the last micro-batch?"
            )
        device = self._part_sq.device
        sizes = torch.tensor([self._inverse_part_size, self._inverse_num_examples], dtype=torch.float64, device=device)
        norms = [self._part_sq, grad_sq] if grad_l1 is None else [self._part_sq, grad_sq, grad_l1]
        return torch.cat([torch.stack([norm.to(self._part_sq) for norm in norms]), sizes])

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the numbers of all ranks, added up."""
        part_sq, grad_sq, *l1, inverse_part_size, inverse_num_examples = totals
        return GradientMoments(
            part_sq=part_sq,
            part_size=1 / inverse_part_size,
            grad_sq=grad_sq,
            num_examples=1 / inverse_num_examples,
            num_parts=self.num_parts * self.dp_size,
            grad_l1=l1[0] if l1 else None,
        )
