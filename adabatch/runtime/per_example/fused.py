"""Fused layers: their weight gradient is the sum of the examples' gradients, in the place of autograd's own.

A layer that forms the examples' gradients for their norms does the work of its weight gradient a second time. A fused
layer does it once: its forward runs with parameters that ask for no gradient, and a node of the graph behind it gives
the parameters the sum of the examples' gradients in the backward. The sum reaches the parameters as any gradient does,
so their hooks, DDP and FSDP2 see nothing unusual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adabatch.runtime.per_example.contributions import (
    Contribution,
    Dense,
    gradient_runs,
    gradients_are_cheaper,
    squared_sums,
)
from adabatch.runtime.per_example.rules import RULES, pads_of
from adabatch.runtime.per_example.sites import Site
from adabatch.runtime.wrappers.fsdp2 import class_of


@dataclass(frozen=True)
class Summed(Contribution):
    """A contribution that was summed over its examples, and what the same pass over their gradients gave.

    Args:
        contribution: the contribution itself.
        known: its squared norms, shape (num_examples,).
        known_coordinates: its sums of squares of each coordinate; None if not measured.
    """

    contribution: Contribution
    known: Tensor
    known_coordinates: Tensor | None

    @property
    def num_examples(self) -> int:
        return self.contribution.num_examples

    @property
    def dense_is_smaller(self) -> bool:
        return self.contribution.dense_is_smaller

    def squares(self) -> Tensor:
        return self.known

    def products(self, direction: Tensor) -> Tensor:
        return self.contribution.products(direction)

    def dense(self, part: slice) -> Tensor:
        return self.contribution.dense(part)

    def coordinate_squares(self) -> Tensor | None:
        return self.known_coordinates


def summed(contribution: Contribution, parameter: Tensor, *, hold: bool, coordinates: bool) -> tuple[Summed, Tensor]:
    """Sums a contribution over its examples; squared norms come from the same pass over their gradients.

    Args:
        contribution: what a call adds to the gradients of a parameter.
        parameter: the parameter.
        hold: the contribution is held, so take its smaller form.
        coordinates: also sum the squares of each coordinate.

    Returns:
        The contribution, and the sum in the parameter's shape and dtype.
    """
    if hold and contribution.dense_is_smaller:
        contribution = Dense(contribution.dense(slice(0, contribution.num_examples)))
    squares: list[Tensor] = []
    total = of_coordinates = None
    for gradients in gradient_runs([contribution], parameter.numel(), parameter.device):
        squares.append(squared_sums(gradients))
        of_run = gradients.sum(0)
        total = of_run if total is None else total.add_(of_run)
        if coordinates:
            of_run = gradients.square().sum(0)
            of_coordinates = of_run if of_coordinates is None else of_coordinates.add_(of_run)
    assert total is not None
    return Summed(contribution, torch.cat(squares), of_coordinates), total.to(parameter.dtype)


def _conv_is_worth_it(module: nn.Module, inputs: Tensor) -> bool:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    pads = pads_of(module)[::-1]  # in the order of the dimensions
    num_positions = 1
    for dim, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        size = inputs.shape[2 + dim] + pads[2 * dim] + pads[2 * dim + 1]
        num_positions *= (size - dilation * (kernel - 1) - 1) // stride + 1
    num_cols = module.in_channels // module.groups * math.prod(module.kernel_size)
    return gradients_are_cheaper(num_positions, module.out_channels // module.groups, num_cols)


def _linear_is_worth_it(module: nn.Module, inputs: Tensor) -> bool:
    assert isinstance(module, nn.Linear)
    num_positions = math.prod(inputs.shape[1:-1])
    # Of one position the norm needs no gradient, however small the layer is.
    return num_positions > 1 and gradients_are_cheaper(num_positions, module.out_features, module.in_features)


# Whether the norms of a layer are taken from the gradients themselves, for an input of one example per row.
_IS_WORTH_IT: Mapping[type[nn.Module], Callable[[nn.Module, Tensor], bool]] = MappingProxyType(
    {
        nn.Linear: _linear_is_worth_it,
        nn.Conv1d: _conv_is_worth_it,
        nn.Conv2d: _conv_is_worth_it,
        nn.Conv3d: _conv_is_worth_it,
    }
)


class FusedCall:
    """One forward of a fused layer, whose parameters ask for no gradient between `open` and `close`.

    So autograd leaves out their gradients. Bias and weight are taken together, because some kernels compute both
    gradients if either is asked for.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def open(self) -> None:
        """The parameters ask for no gradient."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def close(self) -> None:
        """The parameters ask for gradients again."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)


def fused_call(site: Site, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> FusedCall | None:
    """A forward of a fused layer; None if the layer goes by autograd's own gradient.

    Fused are linear layers and convolutions of exactly torch's classes with our own rules, whose norms are taken from
    the examples' gradients. Not fused are frozen weights, and weights that were put in the place of the parameter
    (`torch.func.functional_call`) or are of a tensor class of their own.

    Args:
        site: the layer.
        names: its trainable parameters.
        args: positional arguments of the forward.
        kwargs: its keyword arguments.
    """
    kind = class_of(site.module)
    is_worth_it = _IS_WORTH_IT.get(kind)
    if is_worth_it is None or site.rule is not RULES[kind] or "weight" not in names or not torch.is_grad_enabled():
        return None
    parameters = {name: getattr(site.module, name) for name in names}
    inputs: Any = next(iter((*args, *kwargs.values())), None)
    if any(type(each) is not nn.Parameter or not each.requires_grad for each in parameters.values()):
        return None
    if type(inputs) is not Tensor or inputs.dim() <= site.rule.item_dims(site.module):
        return None
    return FusedCall(parameters) if is_worth_it(site.module, inputs) else None


OnGrad: TypeAlias = Callable[[Tensor, Tensor], Sequence[Tensor]]


class _SumOfExamples(torch.autograd.Function):
    """The output of a layer, as it is; its backward gives the layer's parameters their gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, on_grad: OnGrad, *parameters: Tensor) -> Tensor:
        # As autograd saves them, so activation checkpointing and offloading treat them like a layer's own.
        ctx.save_for_backward(inputs)
        ctx.on_grad = on_grad
        # Not the output itself, which would become a view that in-place operations (ReLU) refuse.
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        return grad, None, None, *ctx.on_grad(inputs, grad)


def with_sum_of_examples(output: Tensor, inputs: Tensor, call: FusedCall, on_grad: OnGrad) -> Tensor:
    """The output of a fused forward, through which its parameters get their gradients.

    Args:
        output: what the layer returned; must not be used otherwise.
        inputs: its input.
        call: the forward, closed.
        on_grad: (inputs, gradient at the output) -> the gradients of the call's parameters, in order.
    """
    parameters = call.parameters.values()
    fused: Tensor = _SumOfExamples.apply(output, inputs.detach(), on_grad, *parameters)  # type: ignore[no-untyped-call]
    return fused
