"""The exact probe: the norm of every example's gradient, and its inner product with the step's gradient.

Each example is a part, so a step of b examples gives b parts where the micro-batch probe gives a handful: the tests of
the papers to the letter, on one rank without accumulation as well. It costs up to one more backward; see
`adabatch.runtime.per_example` for what it measures and which modules it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from adabatch.batch.moments import EXAMPLES, INNER_PRODUCTS, NOISE, GradientMoments
from adabatch.runtime.per_example import ExampleGradients, PerExampleNorms, Rule
from adabatch.runtime.probes.micro_batch import norms, sum_of_squares


class PerExampleProbe:
    """Noise and signal from single examples, in the step's own backward; optionally the noise along the gradient.

    Args:
        model: as the loop calls it, plain or in ``DistributedDataParallel``.
        products: also measure inner products, for ``InnerProductTest``, ``OrthogonalityTest`` and
            ``AugmentedInnerProductTest``. The activations of all micro-batches of a step are then held until its
            gradient is known, so accumulation saves no memory.
        leave_one_out: compare each example with the mean of the others, ``p_i' = (b p_i - s_i) / (b - 1)``; matters for
            small batches. Needs ``products``.
        rules: rules for module classes of your own.

    Raises:
        ValueError: a module that couples the examples of a micro-batch (batch normalization), or ``leave_one_out``
            without ``products``.

    The loss must be a mean over the examples of the micro-batch.

    Source: the tests of Bollapragada, Byrd, Nocedal 2018 and Lau, Liu, Kolar 2024; for the norms see `PerExampleNorms`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        products: bool = False,
        leave_one_out: bool = False,
        rules: Mapping[type[nn.Module], Rule] = MappingProxyType({}),
    ) -> None:
        if leave_one_out and not products:
            raise ValueError("leave_one_out corrects inner products: pass products=True with it")
        self.gives = frozenset({NOISE, EXAMPLES, INNER_PRODUCTS} if products else {NOISE, EXAMPLES})
        self._norms = PerExampleNorms(model, products=products, rules=rules)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._products = products
        self._leave_one_out = leave_one_out
        self._dp_size = 1
        self._held: list[tuple[float, ExampleGradients]] = []

    def start(self, dp_size: int) -> None:
        """A probed step begins."""
        self._dp_size = dp_size
        self._held.clear()
        self._norms.remove()  # a step that was broken off left it listening
        self._norms.start()
        device = self._parameters[0].device
        self._examples_sq = torch.zeros((), dtype=torch.float64, device=device)
        self._inverse_num_examples = 0.0

    def begin_part(self) -> None:
        """Nothing: the measurement began before the forward, in ``start`` or when the part before ended."""

    def end_part(self, num_examples: float, weight: float) -> None:
        """The backward of a micro-batch has ended; ``weight`` is its share of this rank's gradient."""
        examples = self._norms.finish(loss_scale=weight)
        self._norms.start()
        count = examples.examples_sq.shape[0]  # the parts are the examples themselves, whatever they count for
        each = weight / self._dp_size / count
        self._examples_sq += each * examples.examples_sq.double().sum()
        self._inverse_num_examples += each**2 * count
        if self._products:
            self._held.append((each, examples))

    def collect(self) -> Tensor:
        """This rank's share of the sums, shape (3,), or (7,) with inner products."""
        self._norms.remove()
        device = self._examples_sq.device
        pieces = [norms(p.grad) for p in self._parameters if p.grad is not None]
        grad_sq = sum_of_squares(pieces, device) / self._dp_size
        count = torch.tensor([self._inverse_num_examples], dtype=torch.float64, device=device)
        numbers = [self._examples_sq.view(1), grad_sq.view(1), count]
        if self._products:
            sums = torch.zeros(4, dtype=torch.float64, device=device)
            for each, examples in self._held:
                p, s = examples.products().double(), examples.examples_sq.double()
                sums += each * torch.stack([p.sum(), (p * p).sum(), (p * s).sum(), (s * s).sum()])
            numbers.append(sums)
            self._held.clear()
        return torch.cat(numbers)

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the sums over all ranks."""
        examples_sq, grad_sq, inverse_num_examples, *sums = totals
        num_examples = 1 / inverse_num_examples
        return GradientMoments(
            part_sq=examples_sq,
            part_size=1.0,
            grad_sq=grad_sq,
            num_examples=num_examples,
            num_parts=round(num_examples),
            noise_along=self._noise_along(examples_sq, num_examples, *sums) if sums else None,
        )

    def _noise_along(self, s: float, b: float, p: float, pp: float, ps: float, ss: float) -> float:
        """Variance of the inner products over their mean, from weighted means of p, p^2, p s and s^2."""
        if self._leave_one_out:
            p, pp = (b * p - s) / (b - 1), (b * b * pp - 2 * b * ps + ss) / (b - 1) ** 2
        variance = (pp - p * p) * b / (b - 1)
        return variance / p if p > 0 else math.nan

    def remove(self) -> None:
        """Takes every hook off the model."""
        self._norms.remove()
        self._held.clear()
