"""Squared norms and inner products of every example's gradient, from an ordinary ``loss.backward()``.

While a micro-batch is measured, the input of each module with parameters is kept in the forward, and combined in the
backward with the gradient at the module's output, by the module's rule (`rules`). Nothing runs twice, so dropout masks,
data augmentation and activations are those of the real step, and no example's gradient is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adabatch.batch.moments import GradientMoments
from adabatch.runtime.per_example.measurement import Held, Measurement
from adabatch.runtime.per_example.products import example_moments
from adabatch.runtime.per_example.rules import Rule
from adabatch.runtime.per_example.sites import find_sites, refuse_coupled


@dataclass(frozen=True, eq=False)
class ExampleGradients:
    """The statistics of the examples' gradients in one micro-batch, returned by `PerExampleNorms.finish`.

    The gradient ``g_i`` of example i is n times the gradient of its share of the loss, in a micro-batch of n examples.
    If the loss is a mean over examples, this is the gradient of the example's own loss. In any case, ``mean_i g_i`` is
    the gradient of the micro-batch.

    Args:
        examples_sq: ``s_i = |g_i|^2``, shape (num_examples,), float32 or float64, on the model's device.
        parameters_sq: each parameter's share of ``examples_sq``, by its name in the model, same shape.
        coordinates_sq: ``sum_i g_i^2`` of each coordinate, by the parameter's name and in its shape; None if not
            measured.
    """

    examples_sq: Tensor
    parameters_sq: Mapping[str, Tensor]
    coordinates_sq: Mapping[str, Tensor] | None
    _factor: float
    _held: Sequence[Held] | None
    _parameters: Mapping[str, nn.Parameter]

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter with this name."""
        return self._parameters[name]

    @torch.no_grad()
    def products(self, direction: Mapping[str, Tensor] | None = None) -> Tensor:
        """Inner products ``p_i = <g_i, direction>`` of every example, without another pass over the model.

        For each parameter, its layer is applied once more to the kept input, with the direction instead of the
        weights, and the result is multiplied by the gradient at the output. This costs a third of a step
        (`products_by_jvp` costs a whole step).

        Args:
            direction: a tensor for each trainable parameter, by its name in the model, in the parameter's shape. By
                default the parameters' ``.grad``, which must then hold the step's mean gradient: all micro-batches
                accumulated and reduced, unscaled, and not yet clipped.

        Returns:
            Shape (num_examples,), in the dtype of ``examples_sq``.

        Raises:
            RuntimeError: if the norms were measured with ``products=False``, so that nothing was kept.
        """
        if self._held is None:
            raise RuntimeError(
                "inner products need what the backward left behind: build PerExampleNorms(model, "
                "products=True), or run the losses again with products_by_jvp"
            )
        if direction is None:
            direction = self.gradient()
        along = {name: grad.to_dense() if grad.is_sparse else grad for name, grad in direction.items()}
        total = torch.zeros_like(self.examples_sq)
        for held in self._held:
            total += held.products(along)
        return total * self._factor

    def gradient(self) -> dict[str, Tensor]:
        """The parameters' ``.grad`` by their names in the model. Gathers sharded ones, so all ranks must call it."""
        grads = {name: parameter.grad for name, parameter in self._parameters.items()}
        return {
            name: grad.full_tensor() if isinstance(grad, DTensor) else grad
            for name, grad in grads.items()
            if grad is not None
        }

    def moments(self, direction: Mapping[str, Tensor] | None = None, *, leave_one_out: bool = False) -> GradientMoments:
        """`example_moments` of these norms and products, for a step of this one micro-batch on one rank."""
        return example_moments(self.examples_sq, self.products(direction), leave_one_out=leave_one_out)


class PerExampleNorms:
    """Measures ``|g_i|^2`` of every example during the ordinary backward of a micro-batch.

        norms = PerExampleNorms(model, products=True)
        norms.start()
        loss_fn(model(x), y).backward()        # a mean over the examples
        examples = norms.finish()
        examples.examples_sq                   # |g_i|^2
        examples.products()                    # <g_i, g>, with g in the parameters' .grad

    Between ``finish`` and ``start`` the model has no hooks, so steps that are not measured cost nothing extra.

    A module with a rule (`rules.RULES`: linear, convolution, embedding and normalisation layers) costs at most as much
    as its weight gradient. Any other module with parameters is run again, example by example (`replay.Replay`). If such
    a module has children, they are run again with it, so its own parameters are cheaper in a small separate module.

    Under autocast, norms are taken in float32 of the activations and gradients that the step computed. The inputs of a
    checkpointed module are recomputed with it. A compiled model runs eagerly while it is measured.

    Terms of a loss that couple examples (contrastive losses, load balancing) are not detected: each example gets the
    part that the backward assigns to it.

    Args:
        model: the model that the loop calls: plain, in DDP, or sharded by FSDP2. The examples lie along the first
            dimension of every module's input. An input with a first dimension of 1 (positions, for instance) is shared
            by all examples, and the module's output is expanded to them.
        products: also keep what inner products with the step's gradient need, as long as the `ExampleGradients` lives:
            inputs and output gradients of the layers, or their per-example gradients if those are smaller.
        check: in the first measured micro-batch, compare the sum of the examples' gradients with each parameter's
            gradient. This finds parameters that are used outside the module that owns them, and costs a third of a step
            and one host sync. Also run the forward once more, without gradients and with one example less, to find
            modules whose rows are positions, times or tokens.
        rules: rules for your own module classes; they take precedence.
        examples_first: state that the examples lie along the first dimension of every module's input. Needed where this
            cannot be found out: in a sharded model whose sequences are as long as the micro-batch is large.
        fused: in layers that form the examples' gradients for their norms (most convolutions, and linear layers on long
            sequences), take the gradients of weight and bias as the sum of these, in the place of autograd's own. Norms
            then cost about half as much in convolutions, and next to nothing in such linear layers. The gradients
            differ in their last bits from those of a step that is not measured (under autocast they are more precise,
            as they are summed in float32), and cannot be differentiated again. Autograd's own are formed too in
            the micro-batch that ``check`` looks at, and are then replaced.
        coordinates: also sum the squares of each coordinate over the examples, at 4 bytes per parameter. Except for
            embeddings and for linear layers applied once per example, the examples' gradients are formed for this, a
            few at a time, which costs as much as the weight gradient.

    Raises:
        ValueError: if a module couples the examples (batch normalisation in training mode), does not have them along
            the first dimension, or would be run again with other random numbers.

    Source: Goodfellow 2015 (linear layers); Rochette et al. 2019 (convolutions); Gray et al. 2024 (sequences and
    normalisation layers).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        products: bool = False,
        check: bool = True,
        rules: Mapping[type[nn.Module], Rule] = MappingProxyType({}),
        coordinates: bool = False,
        examples_first: bool = False,
        fused: bool = False,
    ) -> None:
        self._fused = fused
        self._examples_first = examples_first
        self._coordinates = coordinates
        self._model = model
        self._sites = find_sites(model, rules)
        self._products = products
        self._check = check
        self._measurement: Measurement | None = None
        refuse_coupled(model, self._sites)

    def start(self, num_examples: int | None = None) -> None:
        """Begins to measure. Call it before the forward of a micro-batch.

        Args:
            num_examples: examples in the micro-batch; by default the first dimension of the first tensor that the model
                is called with.

        Raises:
            ValueError: for the same reasons as the constructor.
            RuntimeError: if the previous micro-batch was not finished.
        """
        if self._measurement is not None:
            raise RuntimeError("a micro-batch is being measured: call finish() after its backward, or remove()")
        # Again, as modules may have switched between training and evaluation mode since.
        refuse_coupled(self._model, self._sites)
        self._measurement = Measurement(
            self._model,
            self._sites,
            num_examples,
            hold=self._products,
            check=self._check,
            coordinates=self._coordinates,
            examples_first=self._examples_first,
            fused=self._fused,
        )

    def expect(self, num_examples: int) -> None:
        """States, between forward and backward, how many examples the micro-batch has.

        Raises:
            ValueError: if the model was called with another number.
        """
        seen = None if self._measurement is None else self._measurement.num_examples
        if seen is not None and seen != num_examples:
            raise ValueError(
                f"the micro-batch holds {num_examples} examples, and the model was called with a first dimension of "
                f"{seen}: views, tokens or positions in it would be taken for examples. Call the model with one "
                f"example per row (once for each view), pass count= to AdaptiveBatch.steps if the first number is "
                f"wrong, or use the norm test from micro-batches"
            )

    def finish(self, *, loss_scale: float = 1.0) -> ExampleGradients:
        """Removes the hooks and returns the statistics. Call it after the backward.

        Args:
            loss_scale: the factor on the mean loss before its backward: 1 / accumulation steps, times the scale of a
                gradient scaler.

        Raises:
            RuntimeError: if ``start`` was not called, if there was no backward, if a parameter has a gradient that no
                module accounts for, or if it was reached by two backwards.
        """
        measurement = self._measurement
        if measurement is None:
            raise RuntimeError("no micro-batch is being measured: call start() before its forward")
        # first: what raises below leaves no hook behind
        self.remove()
        measurement.settle()
        # once is enough, since modules do not change what their rows are from one micro-batch to the next
        self._check = False
        assert measurement.num_examples is not None
        factor = measurement.num_examples / loss_scale
        # The hooks saw gradients of the scaled mean over n examples; times n / scale they are those of the examples.
        squares = {name: square * factor**2 for name, square in measurement.squares.items()}
        coordinates = measurement.coordinates
        if coordinates is not None:
            coordinates = {name: square * factor**2 for name, square in coordinates.items()}
        held = None if measurement.held is None else tuple(measurement.held)
        total = torch.stack(list(squares.values())).sum(0)
        return ExampleGradients(total, squares, coordinates, factor, held, measurement.parameters)

    def remove(self) -> None:
        """Removes every hook and abandons the current measurement."""
        if self._measurement is not None:
            self._measurement.close()
            self._measurement = None
