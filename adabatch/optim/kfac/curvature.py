"""What is sent back from the model's output to measure the curvature of the loss there.

Each function gives cotangents: gradients of a loss, summed over the examples, with respect to the outputs. Sent back to
a layer's output they are per-example gradients: no mean over the batch, no accumulation and no loss scale is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from adabatch.arguments import require_one_of

Likelihood = Literal["categorical", "gaussian"]
"""What the loss is the negative logarithm of: cross-entropy on logits, or half the squared error."""

Fisher = Literal["monte-carlo", "empirical", "gauss-newton"]
"""Which gradients the output factor is made of."""


def cotangents(
    outputs: Tensor,
    targets: Tensor | None,
    *,
    fisher: Fisher,
    likelihood: Likelihood,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Cotangents of the outputs, each of their shape; the last dimension holds the classes or the coordinates.

    * "monte-carlo": one, for targets drawn from the model's own likelihood. The Fisher matrix in expectation.
    * "empirical": one, for the given targets. Vanishes with the residual, and is not a curvature of the loss.
    * "gauss-newton": one for each class or coordinate. The Fisher matrix itself, for as many backward passes.

    Raises:
        ValueError: "empirical" without targets, or with targets of another shape than the outputs take.
    """
    values = outputs.detach()
    values = values if values.dtype is torch.float64 else values.float()
    if fisher == "empirical":
        yield _residual(values, _checked(values, targets, likelihood), likelihood)
    elif fisher == "monte-carlo":
        yield _residual(values, _drawn(values, likelihood, generator), likelihood)
    else:
        chances = values.softmax(-1)
        for index in range(values.shape[-1]):
            unit = torch.zeros_like(values)
            unit[..., index] = 1
            if likelihood == "categorical":
                # sum_c p_c (e_c - p)(e_c - p)^T is the covariance of a one-hot draw, diag(p) - p p^T.
                yield chances[..., index : index + 1].sqrt() * (unit - chances)
            else:
                yield unit


def _residual(values: Tensor, targets: Tensor, likelihood: Likelihood) -> Tensor:
    if likelihood == "gaussian":
        return values - targets
    return values.softmax(-1).scatter_add(-1, targets.unsqueeze(-1), -torch.ones_like(values[..., :1]))


def _drawn(values: Tensor, likelihood: Likelihood, generator: torch.Generator | None) -> Tensor:
    if likelihood == "gaussian":
        noise = torch.empty_like(values)
        return values + noise.normal_(generator=generator)
    # Where the outputs are not finite any draw will do: what is sent back is not finite either, and is left out.
    flat = values.softmax(-1).nan_to_num(nan=1.0).flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(values.shape[:-1])


def _checked(values: Tensor, targets: Tensor | None, likelihood: Likelihood) -> Tensor:
    shape = values.shape if likelihood == "gaussian" else values.shape[:-1]
    if targets is None:
        raise ValueError(
            "fisher='empirical' is made of the gradients at the true targets: call observe(outputs, targets), or use "
            "fisher='monte-carlo', which draws its own"
        )
    if targets.shape != shape:
        raise ValueError(
            f"targets must have the shape {tuple(shape)} for {likelihood} outputs of shape {tuple(values.shape)}, got "
            f"{tuple(targets.shape)}"
        )
    return targets


def check(fisher: str, likelihood: str) -> None:
    """Raises ``ValueError`` for a name that is none of ours."""
    for name, value, allowed in (("fisher", fisher, Fisher), ("likelihood", likelihood, Likelihood)):
        require_one_of(name, value, allowed)
