"""Inverse powers of damped factors, as operators on gradients.

A factor is a symmetric positive semi-definite matrix X, a diagonal, or rows R with X = R^T R. A `Root` is the operator
``(X + rho)^-e``. Matrices are scaled to trace 1 first, so that nothing overflows or underflows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Root(NamedTuple):
    """The operator ``scale - core^T core`` (rows), or ``core`` itself (a matrix, a diagonal or a number).

    Args:
        core: shape (d, d), (d,), () or, with a ``scale``, (num_rows, d).
        scale: the operator on the complement of the span of the rows, shape (); None for the other forms.
    """

    core: Tensor
    scale: Tensor | None = None

    def of_rows(self, grad: Tensor) -> Tensor:
        """``root @ grad``, for ``grad`` of shape (d, k)."""
        if self.scale is not None:
            return self.scale * grad - self.core.T @ (self.core @ grad)
        if self.core.dim() == 2:
            return self.core @ grad
        return self.core.unsqueeze(-1) * grad if self.core.dim() == 1 else self.core * grad

    def of_columns(self, grad: Tensor) -> Tensor:
        """``grad @ root``, for ``grad`` of shape (k, d)."""
        # The operator is symmetric. A chain of products without a transposition leaves the result contiguous.
        if self.scale is not None:
            return self.scale * grad - (grad @ self.core.T) @ self.core
        return grad @ self.core if self.core.dim() == 2 else self.core * grad


class Inverted(NamedTuple):
    """An inverse, and LAPACK's ``info``, shape (), int32: zero if the factorization succeeded."""

    root: Root
    info: Tensor


def inverse(moment: Tensor, *, damping: float, trace: float, dtype: torch.dtype) -> Inverted:
    """``(moment + damping)^-1`` by a Cholesky factorization in ``dtype``; ``info`` is nonzero if it failed."""
    # cholesky_ex() does not raise, and reports in a tensor: no host sync per matrix.
    scaled = moment.to(dtype) / trace
    scaled.diagonal().add_(damping / trace)
    factor, info = torch.linalg.cholesky_ex(scaled)
    # After a failure the factor may be singular, and cholesky_inverse() would raise; its result is not used then.
    factor.diagonal().masked_fill_(info != 0, 1.0)
    # LAPACK lays it out by columns. Ranks that receive it hold it by rows, and a product with another layout rounds
    # differently, so that the weights of the ranks would drift apart.
    return Inverted(Root(torch.cholesky_inverse(factor).div_(trace).to(moment.dtype).contiguous()), info)


def power(moment: Tensor, exponent: float, *, damping: float, trace: float) -> Root:
    """``(moment + damping)^-exponent`` of a matrix or a diagonal, by an eigendecomposition in float64.

    Raises:
        torch.linalg.LinAlgError: if the decomposition did not converge.
    """
    if exponent == 0:
        return Root(torch.ones((), dtype=moment.dtype, device=moment.device))
    if moment.dim() == 1:
        return Root((moment + damping).pow(-exponent))
    # In float32, eigenvalues of a rank-deficient factor are wrong by more than a small damping.
    values, vectors = torch.linalg.eigh(moment.double() / trace)
    powers = (values.clamp(min=0) + damping / trace).pow(-exponent)
    return Root(((vectors * powers) @ vectors.T / trace**exponent).to(moment.dtype))


def power_of_rows(rows: Tensor, exponent: float, *, damping: float) -> Root:
    """``(rows^T rows + damping)^-exponent`` from the small Gram matrix of the rows (push-through identity).

    With ``rows rows^T = U s U^T``, the operator is ``damping^-e - V^T V``, where
    ``V = sqrt((damping^-e - (s + damping)^-e) / s) U^T rows``. The decomposed matrix has shape (num_rows, num_rows)
    instead of (d, d).

    Raises:
        torch.linalg.LinAlgError: if the decomposition did not converge.
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
        input_basis: shape (d_in, d_in); if the input factor is diagonal, shape (d_in,) and not used.
        inverse: shape (d_out, d_in).
    """

    output_basis: Tensor
    input_basis: Tensor
    inverse: Tensor

    def of(self, grad: Tensor) -> Tensor:
        """Applies ``(A (x) B + damping)^-1`` to a gradient of shape (d_out, d_in)."""
        turned = self.output_basis.T @ grad
        if self.input_basis.dim() == 1:
            return self.output_basis @ (turned * self.inverse)
        return self.output_basis @ ((turned @ self.input_basis) * self.inverse) @ self.input_basis.T


def eigen_basis(input_moment: Tensor, output_moment: Tensor, *, damping: float) -> EigenBasis:
    """The exact inverse of ``A (x) B + damping``, by two eigendecompositions in float64.

    Raises:
        torch.linalg.LinAlgError: if a decomposition did not converge.
    """
    out_values, out_basis = torch.linalg.eigh(output_moment.double())
    if input_moment.dim() == 1:
        in_values, in_basis = input_moment.double(), input_moment.double()
    else:
        in_values, in_basis = torch.linalg.eigh(input_moment.double())
    inverse = 1 / (torch.outer(out_values.clamp(min=0), in_values.clamp(min=0)) + damping)
    dtype = output_moment.dtype
    return EigenBasis(out_basis.to(dtype), in_basis.to(dtype), inverse.to(dtype))
