"""Updates of many tensors at once, by torch's multi-tensor kernels or by a loop that gives the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain tensors and parameters, not subclasses, so that torch's multi-tensor kernels take them."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def multiply(targets: list[Tensor], factor: float | Tensor, *, foreach: bool) -> None:
    """``target <- factor * target`` for each target. A tensor as a factor must have one element."""
    if foreach:
        torch._foreach_mul_(targets, factor)
    else:
        for target in targets:
            target.mul_(_fit(factor, target))


def add(targets: list[Tensor], vectors: list[Tensor], factor: float | Tensor, *, foreach: bool) -> None:
    """``target <- target + factor * vector`` for each pair. A tensor as a factor must have one element."""
    # `alpha` must be a number, and reading a tensor's would wait for the device; so a tensor is multiplied first.
    if isinstance(factor, Tensor):
        if foreach:
            torch._foreach_add_(targets, torch._foreach_mul(vectors, factor))
        else:
            for target, vector in zip(targets, vectors, strict=True):
                target.addcmul_(vector, _fit(factor, target))
    elif foreach:
        torch._foreach_add_(targets, vectors, alpha=factor)
    else:
        for target, vector in zip(targets, vectors, strict=True):
            target.add_(vector, alpha=factor)


def _fit(factor: Any, target: Tensor) -> Any:
    """The factor, without the dimension that it would add to a 0-dim ``target``."""
    return factor.squeeze() if isinstance(factor, Tensor) and target.dim() == 0 else factor
