"""Inverse roots of symmetric positive semidefinite matrices, for preconditioners: in float64, every fallback told."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError

ZERO = 1e-30
"""Largest eigenvalue of what counts as zero: from a gradient of norm 1e-15, whose square float32 barely holds."""

JITTERS = (1e-12, 1e-8)
"""Shares of the mean eigenvalue that are added to the diagonal, one after the other, where eigh does not converge."""


def inverse_root(matrices: Tensor, *, exponent: float, epsilon: float, relative: bool) -> Tensor:
    """``(matrix + epsilon I)^-exponent`` of each, in float64.

    A relative epsilon is in units of the largest eigenvalue; a matrix of zeros then has the root zero, which moves
    nothing. With ``epsilon`` zero, eigenvalues within rounding of zero have the root zero too (the pseudo-inverse).

    Args:
        matrices: shape (..., d, d), symmetric, positive semidefinite but for rounding, finite.
        exponent: positive.
        epsilon: what is added to the eigenvalues.
        relative: in units of the largest one.

    Raises:
        torch.linalg.LinAlgError: an eigenvalue decomposition did not converge.
    """
    values, vectors = torch.linalg.eigh(matrices)
    values = values.clamp(min=0)
    largest = values[..., -1:]
    damped = values + epsilon * (largest if relative else 1.0)
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * largest
    powers = torch.where(damped > rounding, damped.pow(-exponent), 0.0)
    if relative:
        powers = torch.where(largest > ZERO, powers, 0.0)
    roots: Tensor = (vectors * powers[..., None, :]) @ vectors.mT
    return roots


def refreshed(
    statistics: Tensor, roots: Tensor, counts: MutableMapping[str, int], root_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """New roots of a stack of statistics; old ones where a root cannot be had.

    Args:
        statistics: shape (n, d, d).
        roots: those so far, shape (n, d, d).
        counts: "jittered" and "kept" are counted up there.
        root_of: float64 matrices to roots; may raise ``LinAlgError``.

    Returns:
        Shape (n, d, d), dtype and device of ``roots``.
    """
    exact = statistics.double() if statistics.device.type != "mps" else statistics.cpu().double()  # MPS has no float64
    try:
        new = root_of(exact)
        if torch.isfinite(new).all():  # host sync
            return new.to(roots)
    except LinAlgError:
        pass
    each = [_one(matrix, root_of, counts) for matrix in exact.cpu()]
    return torch.stack([old if one is None else one.to(roots) for one, old in zip(each, roots, strict=True)])


def _one(matrix: Tensor, root_of: Callable[[Tensor], Tensor], counts: MutableMapping[str, int]) -> Tensor | None:
    """The root of one matrix on the CPU, with as little added to it as it takes."""
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
