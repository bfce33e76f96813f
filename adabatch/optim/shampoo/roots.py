"""Inverse roots of symmetric positive semidefinite matrices, in float32 or float64, with counted fallbacks."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import NamedTuple

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


class Eigen(NamedTuple):
    """Eigenvalues and eigenvectors of a stack of matrices: all of them, or the leading ones.

    Args:
        values: in ascending order, shape (..., r).
        vectors: as columns, shape (..., d, r).
    """

    values: Tensor
    vectors: Tensor

    def last(self, count: int) -> Eigen:
        """Those of the largest eigenvalues."""
        return Eigen(self.values[..., -count:], self.vectors[..., -count:])


def damped_powers(values: Tensor, *, exponent: float, epsilon: float, relative: bool) -> Tensor:
    """``(value + epsilon)^-exponent`` of eigenvalues of positive semidefinite matrices.

    With a relative epsilon, those of a matrix of zeros are zero, so nothing moves. With ``epsilon`` zero, those of
    eigenvalues that are zero up to rounding are zero (the pseudo-inverse).

    Args:
        values: in ascending order, shape (..., r).
        exponent: a positive number.
        epsilon: added to the eigenvalues.
        relative: whether epsilon is in units of the largest eigenvalue.
    """
    # Rounding makes eigenvalues of zero slightly negative.
    values = values.clamp(min=0)
    largest = values[..., -1:]
    damped = values + epsilon * (largest if relative else 1.0)
    # Eigenvalues up to this size may be rounding errors of zeros.
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * largest
    powers = torch.where(damped > rounding, damped.pow(-exponent), 0.0)
    return torch.where(largest > ZERO, powers, 0.0) if relative else powers


def root_matrix(eigen: Eigen, *, exponent: float, epsilon: float, relative: bool) -> Tensor:
    """``(matrix + epsilon I)^-exponent`` of each matrix, from all its eigenvectors; see ``damped_powers``."""
    powers = damped_powers(eigen.values, exponent=exponent, epsilon=epsilon, relative=relative)
    root: Tensor = (eigen.vectors * powers[..., None, :]) @ eigen.vectors.mT
    return root


def inverse_root(matrices: Tensor, *, exponent: float, epsilon: float, relative: bool) -> Tensor:
    """``(matrix + epsilon I)^-exponent`` of each matrix.

    Args:
        matrices: shape (..., d, d), finite, symmetric, and positive semidefinite up to rounding.
        exponent, epsilon, relative: see ``damped_powers``.

    Raises:
        torch.linalg.LinAlgError: if an eigenvalue decomposition did not converge.
    """
    eigen = Eigen(*torch.linalg.eigh(matrices))
    return root_matrix(eigen, exponent=exponent, epsilon=epsilon, relative=relative)


def decomposed(matrices: Tensor, *, epsilon: float) -> Eigen | None:
    """All eigenvectors of float32 matrices; None if they did not converge, or are not exact enough.

    Args:
        matrices: shape (..., d, d).
        epsilon: the damping, in units of the largest eigenvalue; at least ``SINGLE_EPSILON``.
    """
    try:
        eigen = Eigen(*torch.linalg.eigh(matrices))
    except LinAlgError:
        return None
    exact = _error(matrices, eigen) <= LARGEST_ERROR * epsilon * eigen.values[..., -1:].clamp(min=0)
    return eigen if exact.all() else None  # host sync


def _error(matrices: Tensor, eigen: Eigen) -> Tensor:
    """The error of a decomposition as seen by one vector, shape (..., 1): that of the matrix, and that of the basis
    times the largest eigenvalue."""
    values, vectors = eigen
    # Three products of a matrix and a vector; the whole residual would cost as much as the root.
    probe = torch.full_like(values, values.shape[-1] ** -0.5)[..., None]
    image = vectors @ probe
    missed = (matrices @ image - vectors @ (values[..., None] * probe)).norm(dim=-2)
    skew = (vectors.mT @ image - probe).norm(dim=-2)
    return torch.maximum(missed, values[..., -1:] * skew)


def refreshed(
    statistics: Tensor, roots: Tensor, counts: MutableMapping[str, int], root_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """New roots of a stack of statistics, from float64; the old root for each matrix whose root cannot be computed.

    Args:
        statistics: shape (n, d, d).
        roots: the previous roots, shape (n, d, d).
        counts: counts of the fallbacks "jittered" and "kept", updated here.
        root_of: matrices -> their roots; may raise ``LinAlgError``.

    Returns:
        Shape (n, d, d), in the dtype and on the device of ``roots``.
    """
    exact = (statistics.cpu() if has_no_eigh(statistics) else statistics).double()
    new = _tried(exact, root_of)
    if new is not None:
        return new.to(roots)
    # One matrix at a time, since a batched decomposition fails as a whole; on the CPU, whose LAPACK is the most robust.
    each = [_one(matrix, root_of, counts) for matrix in exact.cpu()]
    return torch.stack([old if one is None else one.to(roots) for one, old in zip(each, roots, strict=True)])


def has_no_eigh(tensor: Tensor) -> bool:
    """Whether the tensor is on a device that has neither eigh nor float64."""
    return tensor.device.type == "mps"


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
