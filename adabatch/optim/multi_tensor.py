"""What an update does to many tensors at once: by torch's multi-tensor kernels, or by a loop that gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are tensors and parameters of torch's own, which its multi-tensor kernels take."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def multiply(targets: list[Tensor], factor: float | Tensor, *, foreach: bool) -> None:
    """``target <- factor * target`` for each; a factor that is a tensor has one element."""
    if foreach:
        torch._foreach_mul_(targets, factor)
    else:
        for target in targets:
            target.mul_(_fit(factor, target))


def add(targets: list[Tensor], vectors: list[Tensor], factor: float | Tensor, *, foreach: bool) -> None:
    """``target <- target + factor * vector`` for each pair; a factor that is a tensor has one element."""
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
    """A factor that does not give ``target`` a dimension."""
    return factor.squeeze() if isinstance(factor, Tensor) and target.dim() == 0 else factor
