"""Cotangents of the model's outputs, from which the curvature of the loss is measured.

A cotangent is the gradient, with respect to the outputs, of a loss that is summed over the examples. Propagated back to
a layer's output it gives per-example gradients, which do not depend on the mean over the batch, on accumulation or on a
loss scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from adabatch.arguments import require_one_of

Likelihood = Literal["categorical", "gaussian"]
"""The likelihood whose negative logarithm is the loss: cross-entropy on logits, or half the squared error."""

Fisher = Literal["monte-carlo", "empirical", "gauss-newton"]
"""The gradients from which the output factor is computed."""


def cotangents(
    outputs: Tensor,
    targets: Tensor | None,
    *,
    fisher: Fisher,
    likelihood: Likelihood,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Cotangents of the outputs, each in their shape; the last dimension holds the classes or coordinates.

    * "monte-carlo": one cotangent, for targets drawn from the model's own likelihood. In expectation it gives the
      Fisher matrix.
    * "empirical": one cotangent, for the given targets. It vanishes with the residual, and does not give a curvature of
      the loss.
    * "gauss-newton": one cotangent for each class or coordinate. Together they give the Fisher matrix itself, at the
      cost of as many backward passes.

    Raises:
        ValueError: for "empirical", if there are no targets or their shape does not match the outputs.
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
    # Probabilities minus a one-hot target, which is never formed.
    return values.softmax(-1).scatter_add(-1, targets.unsqueeze(-1), -torch.ones_like(values[..., :1]))


def _drawn(values: Tensor, likelihood: Likelihood, generator: torch.Generator | None) -> Tensor:
    if likelihood == "gaussian":
        noise = torch.empty_like(values)
        return values + noise.normal_(generator=generator)
    # multinomial() raises on NaN. If the outputs are not finite any draw will do: the cotangent is not finite either,
    # and the observation is skipped.
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
    """Raises ``ValueError`` if a name is unknown."""
    for name, value, allowed in (("fisher", fisher, Fisher), ("likelihood", likelihood, Likelihood)):
        require_one_of(name, value, allowed)
