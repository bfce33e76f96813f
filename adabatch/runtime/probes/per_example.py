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
from torch.distributed.tensor import DTensor

from adabatch.batch.moments import EXAMPLES, INNER_PRODUCTS, LAYERS, NOISE, GradientMoments
from adabatch.runtime.layers import Layers, LayerSums
from adabatch.runtime.per_example import ExampleGradients, PerExampleNorms, Rule
from adabatch.runtime.probes.norms import gradients_of, norms
from adabatch.runtime.probes.parts import PartSums
from adabatch.runtime.sharding import own_piece


class PerExampleProbe:
    """Noise and signal from single examples, in the step's own backward; optionally the noise along the gradient.

    Args:
        model: as the loop calls it: plain, in ``DistributedDataParallel``, or sharded by ``fully_shard``.
        products: also measure inner products, for ``InnerProductTest``, ``OrthogonalityTest`` and
            ``AugmentedInnerProductTest``. The activations of all micro-batches of a step are then held until its
            gradient is known, so accumulation saves no memory; and a sharded gradient is gathered on every rank.
        leave_one_out: compare each example with the mean of the others, ``p_i' = (b p_i - s_i) / (b - 1)``; matters for
            small batches. Needs ``products``.
        rules: rules for module classes of your own.
        layers: measure each of them as well.

    Raises:
        ValueError: a module that couples the examples of a micro-batch (batch normalization), ``leave_one_out``
            without ``products``, or a trainable parameter in no layer.

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
        layers: Layers | None = None,
    ) -> None:
        if leave_one_out and not products:
            raise ValueError("leave_one_out corrects inner products: pass products=True with it")
        gives = {NOISE, EXAMPLES, *([INNER_PRODUCTS] if products else []), *([LAYERS] if layers else [])}
        self.gives = frozenset(gives)
        self._norms = PerExampleNorms(model, products=products, rules=rules)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._number = {p: number for number, p in enumerate(self._parameters)}
        self._device = self._parameters[0].device
        self._layer_sums = LayerSums(self._parameters, layers, device=self._device)
        self._sums = PartSums(1, device=self._device)
        self._products = products
        self._leave_one_out = leave_one_out
        self._held: list[tuple[float, ExampleGradients]] = []

    def start(self, dp_size: int) -> None:
        """A probed step begins."""
        self._sums = PartSums(dp_size, device=self._device, layers=self._layer_sums.names, examples=True)
        self._held.clear()
        self._norms.remove()  # a step that was broken off left it listening
        self._norms.start()

    def begin_part(self) -> None:
        """Nothing: the measurement began before the forward, in ``start`` or when the part before ended."""

    def end_part(self, num_examples: float, weight: float) -> None:
        """The backward of a micro-batch has ended; ``weight`` is its share of this rank's gradient."""
        examples = self._norms.finish(loss_scale=weight)
        self._norms.start()
        count = examples.examples_sq.shape[0]  # the parts are the examples themselves, whatever they count for
        squares = [(0, examples.examples_sq)]
        if self._layer_sums.names:
            squares = [(self._number[p], square) for p, square in examples.by_parameter()]
        self._sums.join(count, weight)
        self._sums.close(self._layer_sums.of(squares, power=1) * (weight * weight / count))
        if self._products:
            self._held.append((weight / self._sums.dp_size / count, examples))

    def collect(self) -> Tensor:
        """This rank's share of the sums."""
        self._norms.remove()
        shares = [(number, self._share(grad)) for number, grad in gradients_of(self._parameters)]
        products: dict[str, Tensor] = {}
        if self._products:
            sums = torch.zeros(4, dtype=torch.float64, device=self._device)
            along = self._held[0][1].gradient()
            for each, examples in self._held:
                p, s = examples.products(along).double(), examples.examples_sq.double()
                sums += each * torch.stack([p.sum(), (p * p).sum(), (p * s).sum(), (s * s).sum()])
            products = dict(zip(("p", "pp", "ps", "ss"), sums.unbind(), strict=True))
            self._held.clear()
        return self._sums.numbers(self._layer_sums.of(shares), **products)

    def _share(self, grad: Tensor) -> Tensor:
        """Norms of this rank's share of a reduced gradient: its shard, or a dp-th of what all ranks hold."""
        piece, holders = own_piece(grad)
        return norms(piece) / math.sqrt(holders if isinstance(grad, DTensor) else self._sums.dp_size)

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the sums over all ranks."""
        moments = self._sums.moments(totals)
        if not self._products:
            return moments
        found = self._sums.named(totals)
        p, pp, ps, ss = (found[name][0] for name in ("p", "pp", "ps", "ss"))
        return moments._replace(noise_along=self._noise_along(moments.part_sq, moments.num_examples, p, pp, ps, ss))

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
