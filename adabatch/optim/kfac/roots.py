"""Inverse powers of damped factors, and what applies them to a gradient.

A factor is a symmetric positive semi-definite matrix X, a diagonal, or rows R with X = R^T R. Of each, a `Root` is the
operator ``(X + rho)^-e``. It is computed on the matrix scaled to trace 1, whose entries neither overflow nor vanish.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Root(NamedTuple):
    """The operator ``scale - core^T core`` (rows), or ``core`` itself (a matrix, a diagonal or a number).

    Args:
        core: shape (d, d), (d,), () or, with a ``scale``, (num_rows, d).
        scale: shape (), of the dimensions that the rows do not reach; None for the other forms.
    """

    core: Tensor
    scale: Tensor | None = None

    def of_rows(self, grad: Tensor) -> Tensor:
        """The operator on the rows' side, ``root @ grad``; ``grad`` of shape (d, k)."""
        if self.scale is not None:
            return self.scale * grad - self.core.T @ (self.core @ grad)
        if self.core.dim() == 2:
            return self.core @ grad
        return self.core.unsqueeze(-1) * grad if self.core.dim() == 1 else self.core * grad

    def of_columns(self, grad: Tensor) -> Tensor:
        """The same from the right, ``grad @ root``; ``grad`` of shape (k, d)."""
        return self.of_rows(grad.T).T


class Inverted(NamedTuple):
    """Roots of the form ``X^-1`` with LAPACK's word on whether the factorization went well; shape (), int32."""

    root: Root
    info: Tensor


def inverse(moment: Tensor, *, damping: float, trace: float, dtype: torch.dtype) -> Inverted:
    """``(moment + damping)^-1`` by a Cholesky factorization in ``dtype``; ``info`` is nonzero where it failed."""
    scaled = (moment.to(dtype) / trace).diagonal_scatter(moment.diagonal().to(dtype) / trace + damping / trace)
    factor, info = torch.linalg.cholesky_ex(scaled)
    # What is left of a failed factorization may be singular, and cholesky_inverse would raise.
    factor = torch.where(info == 0, factor, torch.eye(len(factor), dtype=dtype, device=factor.device))
    return Inverted(Root((torch.cholesky_inverse(factor) / trace).to(moment.dtype)), info)


def power(moment: Tensor, exponent: float, *, damping: float, trace: float) -> Root:
    """``(moment + damping)^-exponent`` of a matrix or a diagonal, through a float64 eigendecomposition.

    float64, because float32 eigenvalues of a rank-deficient factor are wrong by more than a small damping.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    if exponent == 0:
        return Root(torch.ones((), dtype=moment.dtype, device=moment.device))
    if moment.dim() == 1:
        return Root((moment + damping).pow(-exponent))
    values, vectors = torch.linalg.eigh(moment.double() / trace)
    powers = (values.clamp(min=0) + damping / trace).pow(-exponent)
    return Root(((vectors * powers) @ vectors.T / trace**exponent).to(moment.dtype))


def power_of_rows(rows: Tensor, exponent: float, *, damping: float) -> Root:
    """``(rows^T rows + damping)^-exponent`` from the small Gram matrix of the rows (push-through identity).

    With ``rows rows^T = U s U^T``, the operator is ``damping^-e - V^T V`` where
    ``V = sqrt((damping^-e - (s + damping)^-e) / s) U^T rows``: (num_rows, num_rows) instead of (d, d).

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    values = values.clamp(min=0)
    outside = torch.as_tensor(damping, dtype=torch.float64, device=rows.device).pow(-exponent)
    drop = (outside - (values + damping).pow(-exponent)).clamp(min=0)
    weight = torch.where(values > 0, (drop / values.clamp(min=torch.finfo(torch.float64).tiny)).sqrt(), 0.0)
    core = (weight.unsqueeze(-1) * (vectors.T @ rows.double())).to(rows.dtype)
    return Root(core, outside.to(rows.dtype))


class EigenBasis(NamedTuple):
    """Eigenvectors of both factors and the damped inverse eigenvalues of their product.

    Args:
        output_basis: shape (d_out, d_out).
        input_basis: shape (d_in, d_in); (d_in,), and not used, where the input factor is diagonal.
        inverse: shape (d_out, d_in).
    """

    output_basis: Tensor
    input_basis: Tensor
    inverse: Tensor

    def of(self, grad: Tensor) -> Tensor:
        """``(A (x) B + damping)^-1`` on a gradient, shape (d_out, d_in)."""
        turned = self.output_basis.T @ grad
        if self.input_basis.dim() == 1:
            return self.output_basis @ (turned * self.inverse)
        return self.output_basis @ ((turned @ self.input_basis) * self.inverse) @ self.input_basis.T


def eigen_basis(input_moment: Tensor, output_moment: Tensor, *, damping: float) -> EigenBasis:
    """The exact inverse of ``A (x) B + damping``, through two float64 eigendecompositions.

    Raises:
        torch.linalg.LinAlgError: a decomposition did not converge.
    """
    out_values, out_basis = torch.linalg.eigh(output_moment.double())
    if input_moment.dim() == 1:
        in_values, in_basis = input_moment.double(), input_moment.double()
    else:
        in_values, in_basis = torch.linalg.eigh(input_moment.double())
    inverse = 1 / (torch.outer(out_values.clamp(min=0), in_values.clamp(min=0)) + damping)
    dtype = output_moment.dtype
    return EigenBasis(out_basis.to(dtype), in_basis.to(dtype), inverse.to(dtype))
