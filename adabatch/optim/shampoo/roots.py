"""Inverse roots of symmetric positive semidefinite matrices, in float64, with counted fallbacks."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError

ZERO = 1e-30
"""A matrix whose largest eigenvalue is at most this counts as zero. It belongs to a gradient of norm 1e-15, whose
square float32 can barely represent."""

JITTERS = (1e-12, 1e-8)
"""If eigh does not converge, these shares of the mean eigenvalue are added to the diagonal, one after the other."""


def inverse_root(matrices: Tensor, *, exponent: float, epsilon: float, relative: bool) -> Tensor:
    """``(matrix + epsilon I)^-exponent`` of each matrix, in float64.

    With a relative epsilon, the root of a matrix of zeros is zero, so nothing moves. With ``epsilon`` zero, directions
    whose eigenvalue is zero up to rounding have the root zero (the pseudo-inverse).

    Args:
        matrices: shape (..., d, d), finite, symmetric, and positive semidefinite up to rounding.
        exponent: a positive number.
        epsilon: added to the eigenvalues.
        relative: whether epsilon is in units of the largest eigenvalue.

    Raises:
        torch.linalg.LinAlgError: if an eigenvalue decomposition did not converge.
    """
    values, vectors = torch.linalg.eigh(matrices)
    # Rounding makes eigenvalues of zero slightly negative.
    values = values.clamp(min=0)
    largest = values[..., -1:]
    damped = values + epsilon * (largest if relative else 1.0)
    # Eigenvalues up to this size may be rounding errors of zeros.
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * largest
    powers = torch.where(damped > rounding, damped.pow(-exponent), 0.0)
    if relative:
        powers = torch.where(largest > ZERO, powers, 0.0)
    roots: Tensor = (vectors * powers[..., None, :]) @ vectors.mT
    return roots


def refreshed(
    statistics: Tensor, roots: Tensor, counts: MutableMapping[str, int], root_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """New roots of a stack of statistics; the old root for each matrix whose root cannot be computed.

    Args:
        statistics: shape (n, d, d).
        roots: the previous roots, shape (n, d, d).
        counts: counts of the fallbacks "jittered" and "kept", updated here.
        root_of: float64 matrices -> their roots; may raise ``LinAlgError``.

    Returns:
        Shape (n, d, d), in the dtype and on the device of ``roots``.
    """
    exact = statistics.double() if statistics.device.type != "mps" else statistics.cpu().double()  # MPS has no float64
    try:
        new = root_of(exact)
        if torch.isfinite(new).all():  # host sync
            return new.to(roots)
    except LinAlgError:
        pass
    # One matrix at a time, since a batched decomposition fails as a whole; on the CPU, whose LAPACK is the most robust.
    each = [_one(matrix, root_of, counts) for matrix in exact.cpu()]
    return torch.stack([old if one is None else one.to(roots) for one, old in zip(each, roots, strict=True)])


def _one(matrix: Tensor, root_of: Callable[[Tensor], Tensor], counts: MutableMapping[str, int]) -> Tensor | None:
    """The root of one matrix on the CPU, with the smallest jitter that works; None if none does."""
    # Without jitter first: the CPU may succeed where the device, or another matrix of the stack, failed.
    for share in (0.0, *JITTERS):
        try:
            root = root_of(matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype))
        except LinAlgError:
            continue
        if torch.isfinite(root).all():
            counts["jittered"] += share > 0
            return root
    counts["kept"] += 1
    return None
