"""Inner products of every example's gradient with the step's gradient, and the moments that follow from them.

There are two ways to compute ``p_i = <g_i, g>`` for all examples without forming their gradients.
`ExampleGradients.products` uses what was kept from the measured backward. It costs a third of a step, and the memory is
held until the gradient is known, at the end of the step. `products_by_jvp` keeps only the batch: it computes the losses
again in forward mode, at the cost of a whole step. It needs the losses as a function of the parameters, the random
numbers of the real pass, and a forward derivative of every operation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adabatch.batch.moments import GradientMoments, from_examples
from adabatch.runtime.random_state import drawing_again


def products_by_jvp(
    losses: Callable[[dict[str, Tensor]], Tensor],
    direction: Mapping[str, Tensor],
    *,
    parameters: Mapping[str, Tensor],
    random_state: Tensor | None = None,
) -> Tensor:
    """Inner products ``p_i = <g_i, direction>`` by one forward-mode derivative of the examples' losses.

    ``p_i = d/dt loss_i(parameters + t direction)`` at t = 0, so no example's gradient is formed.

    Args:
        losses: parameters by name -> the loss of each example, shape (num_examples,); usually
            ``lambda p: loss_fn(torch.func.functional_call(model, p, (x,)), y, reduction="none")``.
        direction: the step's mean gradient, a tensor for each name in ``parameters`` and of its shape.
        parameters: the trainable parameters, by name.
        random_state: what ``runtime.random_state.random_state`` returned before the forward of the real pass, so that
            dropout draws the same masks; by default the pass draws new ones.

    Returns:
        Shape (num_examples,), in the dtype of the losses.

    Raises:
        ValueError: if the names differ, or if the losses are not one number per example.

    Buffers that the forward changes are changed once more. Attention runs in its plain form, the only one with a
    forward derivative.
    """
    if parameters.keys() != direction.keys():
        odd = sorted(parameters.keys() ^ direction.keys())
        raise ValueError(f"parameters and direction must have the same names, which differ in {odd}")
    primals = {name: tensor.detach() for name, tensor in parameters.items()}
    tangents = {name: direction[name].detach().to(primal.dtype) for name, primal in primals.items()}
    device = next(iter(primals.values())).device
    draws = nullcontext() if random_state is None else drawing_again(random_state, device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), draws, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # of torch's own making
        pair: Any = torch.func.jvp(losses, (primals,), (tangents,))
    values: Tensor = pair[0]
    products: Tensor = pair[1]
    if values.dim() != 1:
        raise ValueError(
            f"losses must be one number per example, shape (num_examples,), got shape {tuple(values.shape)}: "
            "take the loss with reduction='none' and its mean over each example's own dimensions"
        )
    return products


def without_own_share(products: Tensor, examples_sq: Tensor) -> Tensor:
    """Inner products with the mean gradient of the *other* examples, ``p_i' = (b p_i - s_i) / (b - 1)``.

    Each example is part of the mean that it is compared with, which adds ``s_i / b`` to ``p_i``. In small batches, much
    of the spread of ``p_i`` is therefore the spread of the norms.

    Args:
        products: ``p_i``, shape (num_examples,), of all b examples of the step.
        examples_sq: ``s_i``, same shape.

    Raises:
        ValueError: if there are fewer than two examples.
    """
    num_examples = products.shape[0]
    if num_examples < 2:
        raise ValueError(f"leaving one out needs at least 2 examples, got {num_examples}")
    return (num_examples * products - examples_sq) / (num_examples - 1)


def example_moments(examples_sq: Tensor, products: Tensor, *, leave_one_out: bool = False) -> GradientMoments:
    """The moments of a step from all its examples, for the exact norm, inner-product and augmented tests.

    Args:
        examples_sq: ``s_i = |g_i|^2``, shape (num_examples,), of all examples of the step.
        products: ``p_i = <g_i, g>`` with the step's mean gradient g, same shape.
        leave_one_out: compute the noise along the gradient from `without_own_share` products, as
            ``Var(p_i') / mean(p_i')``. The squared norms, and with them the norm test, do not change.

    Raises:
        ValueError: if the shapes differ, or if there are fewer than two examples.
    """
    squares = examples_sq.double().cpu().numpy()  # host sync
    inner = products.double().cpu().numpy()
    moments = from_examples(squares, inner)
    if not leave_one_out:
        return moments
    others = without_own_share(products.double(), examples_sq.double())
    signal = float(others.mean())
    along = float(others.var()) / signal if signal > 0 else math.nan
    return moments._replace(noise_along=along)
