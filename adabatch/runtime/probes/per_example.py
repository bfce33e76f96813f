"""The exact probe: the norm of every example's gradient, and its inner product with the step's gradient.

Each example is a part, so a step of b examples has b parts, while the micro-batch probe has a few. The tests of the
papers can be computed exactly, also on one rank without accumulation. The probe costs up to one more backward.
`adabatch.runtime.per_example` describes what is measured, and which modules are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adabatch.arguments import checked
from adabatch.batch.moments import GradientMoments
from adabatch.runtime.collectives import collectives_of
from adabatch.runtime.per_example import ExampleGradients, PerExampleNorms, Rule
from adabatch.runtime.probes.coordinates import SINGLE
from adabatch.runtime.probes.gauge import Gauge
from adabatch.runtime.probes.layers import Layers
from adabatch.runtime.probes.metrics import ProbeNorm, norm_name
from adabatch.runtime.probes.norms import gradients_of
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.wrappers.fsdp2 import is_sharded, own_piece


class PerExampleProbe(Probe):
    """Noise and signal from single examples, measured in the step's own backward; optionally noise along the gradient.

    The loss must be a mean over the examples of the micro-batch.

    Args:
        model: the model that the loop calls: plain, in ``DistributedDataParallel``, or sharded by ``fully_shard``.
        products: also measure inner products, for ``InnerProductTest``, ``OrthogonalityTest`` and
            ``AugmentedInnerProductTest``. The activations of all micro-batches of a step are then kept until its
            gradient is known, so accumulation saves no memory; and a sharded gradient is gathered on every rank.
        leave_one_out: compare each example with the mean of the others, ``p_i' = (b p_i - s_i) / (b - 1)``. This
            matters for small batches. Needs ``products``.
        rules: rules for your own module classes.
        layers: also measure each of these layers.
        norm: the norm of noise and signal: "sign", or a diagonal ``Metric`` such as ``AdamMetric(optimizer)``; by
            default the Euclidean norm. ``NoiseScale`` states the costs. Cannot be combined with ``products``, which are
            Euclidean.
        quantile: also measure this quantile over coordinates, for ``CoordinateNormTest``, which states the cost.
        examples_first: see `PerExampleNorms`.
        fused: form the weight gradients of convolutions, and of linear layers on long sequences, as sums of the
            examples' gradients, which costs less. Gradients of probed steps then differ in their last bits from
            autograd's own. See `PerExampleNorms`.

    Raises:
        ValueError: if a module couples the examples of a micro-batch (batch normalization), if ``leave_one_out`` is
            given without ``products``, ``products`` with a norm, a metric that is not diagonal, or a norm or quantile
            for a sharded model, or if a trainable parameter is in no layer.

    Source: the tests of Bollapragada, Byrd, Nocedal 2018 and Lau, Liu, Kolar 2024; for the norms see `PerExampleNorms`.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        products: bool = False,
        leave_one_out: bool = False,
        rules: Mapping[type[nn.Module], Rule] = MappingProxyType({}),
        layers: Layers | None = None,
        norm: ProbeNorm | None = None,
        quantile: float | None = None,
        examples_first: bool = False,
        fused: bool = False,
    ) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"the model has no parameter that requires a gradient, got {type(model).__name__}")
        if leave_one_out and not products:
            raise ValueError("leave_one_out corrects inner products: pass products=True with it")
        if products and norm is not None:
            raise ValueError(
                f"inner products are Euclidean, and noise in the norm {norm_name(norm)!r} is not: pass one of norm= "
                f"and products=True"
            )
        of_coordinates = norm is not None or quantile is not None
        if of_coordinates and is_sharded(model):
            raise ValueError(
                "single examples of a sharded model do not give norm= or quantile=: every rank would hold the squares "
                "of all its coordinates; use ReduceScatterProbe, or the model in DistributedDataParallel"
            )
        self._norms = PerExampleNorms(
            model,
            products=products,
            rules=rules,
            coordinates=of_coordinates,
            examples_first=examples_first,
            fused=fused,
        )
        self.measured = self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._number = {p: number for number, p in enumerate(self._parameters)}
        self._device = self._parameters[0].device
        self._gauge = Gauge(
            self._parameters,
            owner=self,
            device=self._device,
            same=collectives_of(model) if of_coordinates else SINGLE,
            examples=True,
            layers=layers,
            norm=norm,
            quantile=quantile,
        )
        self.gives = replace(self._gauge.gives, examples=True, products=products)
        self._products = products
        self._leave_one_out = leave_one_out
        self._held: list[tuple[float, ExampleGradients]] = []

    def start(self, dp_size: int) -> None:
        self._gauge.start(dp_size)
        self._held.clear()
        self._norms.remove()  # an abandoned step left it listening
        self._norms.start()

    def begin_part(self, num_examples: int | None = None) -> None:
        """Called before the backward of a micro-batch.

        The measurement has to begin before the forward: it began in ``start``, or when the previous part ended.

        Raises:
            ValueError: if the model was called with a number of examples other than ``num_examples``.
        """
        if num_examples is not None:
            self._norms.expect(num_examples)

    def end_part(self, num_examples: float, weight: float) -> None:
        if weight == 0:  # no example of it counts, whatever its gradients are
            self._gauge.sums.join(num_examples, weight)
            self._norms.remove()
            self._norms.start()
            return
        examples = self._norms.finish(loss_scale=weight)
        self._norms.start()
        count = examples.examples_sq.shape[0]  # not num_examples: the parts are the examples, whatever their weight
        sums, whole = self._gauge.sums, weight * weight / count
        sums.join(count, weight)
        if self._gauge.coordinates is not None:
            assert examples.coordinates_sq is not None
            for name, square in examples.coordinates_sq.items():
                number = self._number[examples.parameter(name)]
                self._gauge.coordinates.add(number, square.flatten(), sums.share * whole)
        squares = [(0, examples.examples_sq)]
        if self._gauge.layer_sums.names:
            squares = [(self._number[examples.parameter(n)], each) for n, each in examples.parameters_sq.items()]
        self._gauge.close(squares, power=1, factor=whole)
        if self._products:
            self._held.append((weight / sums.dp_size / count, examples))

    def collect(self) -> Tensor:
        self._norms.remove()
        products: dict[str, Tensor] = {}
        if self._products:
            sums = torch.zeros(4, dtype=torch.float64, device=self._device)
            along = self._held[0][1].gradient() if self._held else {}
            for each, examples in self._held:
                p, s = examples.products(along).double(), examples.examples_sq.double()
                sums += each * torch.stack([p.sum(), (p * p).sum(), (p * s).sum(), (s * s).sum()])
            products = dict(zip(("p", "pp", "ps", "ss"), sums.unbind(), strict=True))
            self._held.clear()
        grads = gradients_of(self._parameters)
        sharded = isinstance(grads[0][1], DTensor)
        pieces = [(number, own_piece(grad)[0]) for number, grad in grads]
        holders = own_piece(grads[0][1])[1] if sharded else self._gauge.sums.dp_size
        return self._gauge.collect(pieces, holders=holders, **products)

    def moments(self, totals: list[float]) -> GradientMoments:
        moments = self._gauge.moments(totals)
        if not self._products:
            return moments
        found = self._gauge.sums.named(totals)
        p, pp, ps, ss = (found[name][0] for name in ("p", "pp", "ps", "ss"))
        return moments._replace(noise_along=self._noise_along(moments.part_sq, moments.num_examples, p, pp, ps, ss))

    def _noise_along(self, s: float, b: float, p: float, pp: float, ps: float, ss: float) -> float:
        """The variance of the inner products divided by their mean, from weighted means of s, p, p^2, p s and s^2."""
        # a single example has nothing to vary from, like one that has all the weight: as NaN the noise holds the plan
        if b <= 1:
            return math.nan
        # The p_i' themselves are not needed: their mean and mean square follow from the means of s, p, p^2, p s, s^2.
        if self._leave_one_out:
            p, pp = (b * p - s) / (b - 1), (b * b * pp - 2 * b * ps + ss) / (b - 1) ** 2
        variance = (pp - p * p) * b / (b - 1)
        return variance / p if p > 0 else math.nan

    def stop(self) -> None:
        self._norms.remove()
        self._held.clear()

    def remove(self) -> None:
        self.stop()
