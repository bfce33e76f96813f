"""Gram matrices of the gradients of weight matrices, summed over the parts of a step, for the norm of Muon.

A step of Muon has spectral norm one, so gradients are measured in the dual norm, the nuclear norm (the sum of the
singular values). The noise of a matrix in this norm is ``(tr C^(1/2))^2`` with ``C = E[(g_i - G) (g_i - G)^T]`` over
single examples i, taken over the smaller side. With ``S = sum_j w_j g_j g_j^T`` over the parts, ``D = S - g g^T`` is
``C`` divided by the examples in a part, up to a factor that is the same for all matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.optimizers.matrix_owners import dealt_out
from adabatch.runtime.probes.coordinates import SINGLE
from adabatch.runtime.probes.layers import LayerSums
from adabatch.runtime.probes.norms import sum_dtype

ITERATIONS = 18
"""Newton-Schulz iterations. Each multiplies a small eigenvalue by up to 2.25, so eigenvalues above 1e-6 of the
Frobenius norm are resolved."""

RIDGE = 1e-5
"""Added to the eigenvalues before Newton-Schulz, in units of their mean. Rounding makes some eigenvalues negative, and
the iteration diverges on those."""


class MatrixNumbers(NamedTuple):
    """This rank's share of sums over matrices, each of shape (num_layers,).

    Args:
        parts: sums of ``tr D^(1/2)``, unbiased for isotropic normal noise.
        grad: sums of the nuclear norms of the step's gradient.
        first: sums of the nuclear norms of the gradient of this rank's first part.
    """

    parts: Tensor
    grad: Tensor
    first: Tensor


class MatrixGrams:
    """``S`` of each matrix: ``4 k^2`` bytes for a smaller side of k while a probed step runs, twice that in a backward.

    The matrices are summed over the ranks in one reduction. Then each rank computes the roots of some of them.

    Args:
        parameters: the measured parameters.
        layer_sums: sums per layer.
        device: the device of the matrices.
        takes: whether a parameter is measured; if so, it has two dimensions.
        same: the ranks, which see different parts.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layer_sums: LayerSums,
        *,
        device: torch.device,
        takes: Callable[[Tensor], bool],
        same: Collectives = SINGLE,
    ) -> None:
        self._layer_sums = layer_sums
        self._same = same
        self._device = device
        self._dtype = sum_dtype(parameters)
        self._shapes = {n: (min(p.shape), max(p.shape)) for n, p in enumerate(parameters) if takes(p) and p.numel()}
        # By the cube of the smaller side, which is what its eigenvalues cost.
        self._owner = dealt_out({number: float(k) ** 3 for number, (k, _) in self._shapes.items()}, same.size)
        self._flat = torch.zeros(0)
        self._sums: dict[int, Tensor] = {}
        self._first: list[tuple[int, Tensor]] = []

    @property
    def num_bytes(self) -> int:
        """Memory in use at present."""
        return self._flat.numel() * self._flat.element_size()

    def start(self) -> None:
        """Begins a step."""
        self._first.clear()
        # One buffer for all matrices and, at its end, the number of parts: one reduction sums everything.
        lengths = [k * k for k, _ in self._shapes.values()]
        self._flat = torch.zeros(sum(lengths) + 1, dtype=self._dtype, device=self._device)
        pieces = torch.split(self._flat[:-1], lengths)
        self._sums = {
            number: piece.view(k, k) for (number, (k, _)), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def squared(self, number: int, grad: Tensor) -> Tensor | None:
        """``g g^T`` over the smaller side; None for a parameter that is not measured."""
        if number not in self._shapes:
            return None
        dense = grad.to_dense() if grad.is_sparse else grad
        matrix = dense.to(self._dtype)
        return matrix @ matrix.mH if matrix.shape[0] <= matrix.shape[1] else matrix.mH @ matrix

    def add(self, number: int, gram: Tensor, weight: float, first: float | None = None) -> None:
        """Adds ``weight`` times ``g g^T`` to the sum of a matrix.

        Args:
            number: the number of the parameter.
            gram: ``g g^T``.
            weight: the factor on it.
            first: in this rank's first part, the factor that turns ``g`` into the part's mean gradient; else None.
        """
        self._sums[number].add_(gram.to(self._flat), alpha=weight)
        if first is not None:
            self._first.append((number, root_trace(gram.to(self._flat)).view(1) * first))

    def numbers(self, grads: Sequence[tuple[int, Tensor]], num_parts: int) -> MatrixNumbers:
        """The sums, at the end of a step; frees the matrices.

        Args:
            grads: pairs of a parameter's number and its gradient in the step, the same on all ranks.
            num_parts: parts of this rank.
        """
        self._flat[-1] = num_parts
        self._same.sum_in_place(self._flat)
        # The number of independent deviations from the mean: all parts but one. It stays on the device, without a sync.
        freedom = (self._flat[-1].double() - 1).clamp_(min=1)
        parts, lengths = [], []
        for number, grad in grads:
            if number not in self._shapes or self._owner[number] != self._same.rank:
                continue
            k, n = self._shapes[number]
            gram = self.squared(number, grad)
            assert gram is not None
            gram = gram.to(self._flat)
            # With few parts, the root of D is too small on average; the divisor makes up for it.
            trace = root_trace(self._sums[number] - gram) / _shortened((k + 1) / (n * freedom))
            parts.append((number, trace.view(1)))
            lengths.append((number, root_trace(gram).view(1)))
        first, self._first = self._first, []
        self._sums, self._flat = {}, torch.zeros(0)
        return MatrixNumbers(*(self._layer_sums.of(each, power=1) for each in (parts, lengths, first)))


def _shortened(aspect: Tensor) -> Tensor:
    """The mean singular value of a normal matrix, divided by the root mean square of its singular values."""
    x = aspect.clamp(max=1)
    # For large matrices of k rows and n columns this is the hypergeometric function F(-1/2, 1/2; 2; k / n), the mean
    # root under the law of Marchenko and Pastur (1967). This is its series; the third term stands for the remainder, so
    # the error is at most 1.5e-3. With aspect = (k + 1) / n the first order is also right for small matrices.
    return 1 - x / 8 - x.square() / 64 - 0.0106 * x**3


def root_trace(gram: Tensor) -> Tensor:
    """``tr M^(1/2)`` of a positive semidefinite matrix, shape (), float64; no host sync."""
    # Eigenvalues are slow on accelerators, and matrix products are fast.
    if not gram.is_cpu:
        return newton_schulz(gram)
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram.double())
    return eigenvalues.clamp_(min=0).sqrt_().sum()


def newton_schulz(gram: Tensor) -> Tensor:
    """``tr M^(1/2)`` by the coupled Newton-Schulz iteration, in float32; shape (), float64.

    ``Y <- Y (3 - Z Y) / 2`` and ``Z <- (3 - Z Y) Z / 2``, from ``Y = M / |M|`` and ``Z = 1``, converge to the root of
    ``M / |M|`` and to its inverse. Small eigenvalues converge last, from below, which the ridge partly offsets. The
    result for a matrix of zeros is zero.

    Source: Higham (2008), "Functions of Matrices", section 6.7.
    """
    k = gram.shape[0]
    matrix = gram if gram.dtype is torch.float64 else gram.float()
    eye = torch.eye(k, dtype=matrix.dtype, device=matrix.device)
    ridged = matrix + RIDGE * matrix.diagonal().mean().clamp(min=0) * eye
    # No eigenvalue is above the Frobenius norm, so the iteration converges. The clamp is for a matrix of zeros.
    scale = torch.linalg.matrix_norm(ridged).clamp(min=torch.finfo(matrix.dtype).tiny)
    y, z = ridged / scale, eye
    for _ in range(ITERATIONS):
        # A fixed number of products: to test for convergence would be a host sync.
        step = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ step, step @ z
    trace: Tensor = y.diagonal().double().sum() * scale.double().sqrt()
    return trace
