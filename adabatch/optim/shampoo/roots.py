"""Inverse roots of symmetric positive semidefinite matrices, in float32 or float64, with counted fallbacks."""

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


SINGLE_EPSILON = 1e-3
"""Smallest relative epsilon for which float32 is tried. Its decompositions are off by some 1e-6 of the largest
eigenvalue, and by 1e-5 for bad ones."""

LARGEST_ERROR = 0.01
"""Largest error of a decomposition in float32 that is accepted, in units of the damping. The root is then off by about
this times the exponent at most, in every direction."""


def inverse_root(matrices: Tensor, *, exponent: float, epsilon: float, relative: bool) -> Tensor:
    """``(matrix + epsilon I)^-exponent`` of each matrix.

    With a relative epsilon, the root of a matrix of zeros is zero, so nothing moves. With ``epsilon`` zero, directions
    whose eigenvalue is zero up to rounding have the root zero (the pseudo-inverse). In float32, a root whose
    decomposition is not exact enough is not a number.

    Args:
        matrices: shape (..., d, d), finite, symmetric, and positive semidefinite up to rounding; float32 only with a
            relative epsilon of at least ``SINGLE_EPSILON``.
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
    if matrices.dtype is torch.float32:
        exact = _error(matrices, values, vectors) <= LARGEST_ERROR * epsilon * largest
        roots = torch.where(exact[..., None], roots, torch.nan)
    return roots


def _error(matrices: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """The error of a decomposition as seen by one vector, shape (..., 1): that of the matrix, and that of the basis
    times the largest eigenvalue."""
    # Three products of a matrix and a vector; the whole residual would cost as much as the root.
    probe = torch.full_like(values, values.shape[-1] ** -0.5)[..., None]
    image = vectors @ probe
    missed = (matrices @ image - vectors @ (values[..., None] * probe)).norm(dim=-2)
    skew = (vectors.mT @ image - probe).norm(dim=-2)
    return torch.maximum(missed, values[..., -1:] * skew)


def refreshed(
    statistics: Tensor,
    roots: Tensor,
    counts: MutableMapping[str, int],
    root_of: Callable[[Tensor], Tensor],
    *,
    single: bool,
) -> Tensor:
    """New roots of a stack of statistics; the old root for each matrix whose root cannot be computed.

    Args:
        statistics: shape (n, d, d).
        roots: the previous roots, shape (n, d, d).
        counts: counts of the fallbacks "float64", "jittered" and "kept", updated here.
        root_of: matrices -> their roots; may raise ``LinAlgError``.
        single: try float32 first, if the statistics are in float32.

    Returns:
        Shape (n, d, d), in the dtype and on the device of ``roots``.
    """
    on_mps = statistics.device.type == "mps"  # which has no float64 and no eigh
    if single and statistics.dtype is torch.float32 and not on_mps:
        new = _tried(statistics, root_of)
        if new is not None:
            return new
        counts["float64"] += 1
    exact = (statistics.cpu() if on_mps else statistics).double()
    new = _tried(exact, root_of)
    if new is not None:
        return new.to(roots)
    # One matrix at a time, since a batched decomposition fails as a whole; on the CPU, whose LAPACK is the most robust.
    each = [_one(matrix, root_of, counts) for matrix in exact.cpu()]
    return torch.stack([old if one is None else one.to(roots) for one, old in zip(each, roots, strict=True)])


def _tried(matrices: Tensor, root_of: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The roots, or None if one of them is not finite or did not converge."""
    try:
        new = root_of(matrices)
    except LinAlgError:
        return None
    return new if torch.isfinite(new).all() else None  # host sync


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
