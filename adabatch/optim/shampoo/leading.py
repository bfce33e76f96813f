"""Inverse roots by the leading eigenvectors alone, where the damping hides all other eigenvalues.

If all but ``r`` eigenvalues of a matrix are far below the damping, their roots are nearly the same number, and

    (matrix + damping)^-e = scale (1 - rows^T rows)

with ``r`` rows. To apply this takes ``2 r / d`` of the time of a product with a matrix of side ``d``, and the
eigenvectors are followed from one refresh to the next by subspace iteration, in a fraction of the time of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adabatch.optim.shampoo.roots import Eigen, LinAlgError, damped_powers

HIDDEN = 0.1
"""Largest eigenvalue that the damping hides, in units of the damping. Roots in its direction are off by at most this
times the exponent."""

LARGEST_SHARE = 0.25
"""Largest number of leading eigenvectors, as a share of all, at which the others are left out."""

SHORTEST_SIDE = 128
"""Shortest side at which they are left out; shorter ones are decomposed in a millisecond."""

SPARE = 8
"""Eigenvectors that are followed beyond those that count, so that these converge, and others that grow are seen."""

PROBES = 16
"""Random vectors in which an iteration looks for eigenvectors that are new."""

LARGEST_RESIDUAL = 0.1
"""Largest residual of an eigenvector, in units of its eigenvalue and the damping together."""

SWEEPS = 2
"""Iterations after which the whole matrix is decomposed instead."""


class Root(NamedTuple):
    """An inverse root of each matrix of a stack, as a gradient is multiplied by it.

    With ``rank`` 0 it is the matrix itself, else ``scale * (1 - rows^T rows)``.

    Args:
        values: shape (n, d, d); with a rank, its first ``rank`` rows count.
        scale: shape (n,).
        rank: number of rows, the same for all matrices of the stack.
    """

    values: Tensor
    scale: Tensor
    rank: int

    def matrix(self) -> Tensor:
        """The roots as matrices, shape (n, d, d)."""
        if not self.rank:
            return self.values
        return self.of_rows(torch.eye(self.values.shape[-1]).to(self.values).expand_as(self.values))

    def of_rows(self, blocks: Tensor) -> Tensor:
        """``root @ blocks``, shape (n, d, k)."""
        if not self.rank:
            return self.values @ blocks
        rows = self.values[:, : self.rank]
        return torch.baddbmm(blocks, rows.mT, rows @ blocks, alpha=-1).mul_(self.scale[:, None, None])

    def of_columns(self, blocks: Tensor) -> Tensor:
        """``blocks @ root``, shape (n, k, d)."""
        if not self.rank:
            return blocks @ self.values
        rows = self.values[:, : self.rank]
        return torch.baddbmm(blocks, blocks @ rows.mT, rows, alpha=-1).mul_(self.scale[:, None, None])


def leading(eigen: Eigen, *, epsilon: float) -> Eigen | None:
    """The eigenvectors that count of a complete decomposition; None if they are too many to leave the others out."""
    side = eigen.values.shape[-1]
    count = _counted(eigen.values, epsilon) + SPARE
    return eigen.last(count) if side >= SHORTEST_SIDE and count <= LARGEST_SHARE * side else None


def followed(matrices: Tensor, rows: Tensor, *, epsilon: float, seed: int) -> Eigen | None:
    """The leading eigenvectors of matrices from those of earlier ones, by subspace iteration.

    Args:
        matrices: shape (n, d, d).
        rows: the rows of the earlier roots, shape (n, r, d).
        epsilon: the damping, in units of the largest eigenvalue.
        seed: of the random vectors.

    Returns:
        None if they did not converge, or became too many.
    """
    num, known, side = rows.shape
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(PROBES, side, generator=generator).to(matrices)
    basis = torch.cat([rows, probes.expand(num, -1, -1)], dim=1).mT
    image = matrices @ basis
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(image).Q
        image = matrices @ basis
        small = basis.mT @ image
        try:
            values, turn = torch.linalg.eigh((small + small.mT) / 2)
        except LinAlgError:
            return None
        vectors, images = basis @ turn, image @ turn
        missed = (images - vectors * values[..., None, :]).norm(dim=-2)
        damping = epsilon * values[..., -1:]
        count = _counted(values, epsilon)
        close = (missed <= LARGEST_RESIDUAL * (values.abs() + damping)).all()
        if close and count <= known + SPARE:  # host sync
            count += SPARE
            return Eigen(values, vectors).last(count) if count <= LARGEST_SHARE * side else None
    return None


def root_rows(matrices: Tensor, eigen: Eigen, *, exponent: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """Rows, shape (n, r, d), and scales, shape (n,), of the roots of matrices with these leading eigenvectors."""
    side, count = eigen.vectors.shape[-2:]
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    # All other eigenvalues are taken for their mean.
    rest = ((trace - eigen.values.sum(-1)) / (side - count)).clamp(min=0)
    values = torch.cat([rest[..., None], eigen.values], dim=-1)
    powers = damped_powers(values, exponent=exponent, epsilon=epsilon, relative=True)
    scale = powers[..., 0]
    # A matrix of zeros has the scale zero, whatever its rows.
    shares = powers[..., 1:] / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None]
    return (eigen.vectors * (1 - shares).clamp(min=0).sqrt()[..., None, :]).mT, scale


def _counted(values: Tensor, epsilon: float) -> int:
    """The largest number of eigenvalues of a matrix that the damping does not hide."""
    return int((values > HIDDEN * epsilon * values[..., -1:]).sum(-1).max())  # host sync
