"""The statistics of one step's gradient: squared norms, and the noise and signal they imply.

A step's gradient is a weighted mean of *parts*: micro-batches of every rank, or single examples. Part j is the mean
gradient ``g_j`` of ``n_j`` examples and enters with weight ``w_j`` (the weights sum to one). With the true gradient
``G`` and ``V`` the trace of the per-example covariance,

    E[ sum_j w_j |g_j|^2 ]   = |G|^2 + V / part_size       1 / part_size    = sum_j w_j   / n_j
    E[ |sum_j w_j g_j|^2 ]   = |G|^2 + V / num_examples    1 / num_examples = sum_j w_j^2 / n_j

so two squared norms at two sizes give unbiased estimates of both unknowns, for any sizes and weights of the parts
(for two sizes: McCandlish et al. 2018, appendix A.1). Nothing else needs to be sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

EUCLIDEAN = "euclidean"

Norm = Literal["euclidean", "adam", "sign", "spectral", "kfac"]
"""The norm in which noise and signal are measured: the Euclidean norm; that of gradients divided by Adam's root mean
squares; the l1 norm, for methods that step by signs; the nuclear norm of matrices, for Muon; that of K-FAC's
curvature."""


class GradientMoments(NamedTuple):
    """Squared norms of one step's gradient and of its parts, all in the same norm.

    Args:
        part_sq: weighted mean of the parts' squared norms, ``sum_j w_j |g_j|^2``.
        part_size: examples in a part (the harmonic mean of the sizes, by weight); may be fractional.
        grad_sq: squared norm of the step's gradient, ``|sum_j w_j g_j|^2``.
        num_examples: effective number of examples in that gradient; smaller than their count if the weights are
            unequal.
        num_parts: number of parts.
        noise_along: the part of ``noise`` along the gradient (per example, same unit as ``noise``), if it was measured
            from single examples; else None.
        grad_l1: l1 norm of the step's gradient, if it was recorded; else None.
        grad_l2: Euclidean norm of the step's gradient, if ``norm`` is another one; else None.
        noise_at_quantile: ``grad_sq`` times the quantile, over coordinates, of the noise of a coordinate over its
            squared gradient, if it was measured; else None. With this noise the norm test would ask for the same batch
            as the coordinate-wise test.
        norm: the norm of noise, signal and squared norms.
        layers: the moments of each layer by its name, if they were measured; else None.
    """

    part_sq: float
    part_size: float
    grad_sq: float
    num_examples: float
    num_parts: int
    noise_along: float | None = None
    grad_l1: float | None = None
    grad_l2: float | None = None
    noise_at_quantile: float | None = None
    norm: str = EUCLIDEAN
    layers: Mapping[str, GradientMoments] | None = None

    @property
    def noise(self) -> float:
        """Unbiased trace of the per-example gradient covariance; may be negative, and is NaN for fewer than two
        parts."""
        if self.num_parts < 2 or not 0 < self.part_size < self.num_examples:  # or one part that has all the weight
            return math.nan
        # zero only by rounding, when the parts are nearly as large as the batch
        apart = 1 / self.part_size - 1 / self.num_examples
        return (self.part_sq - self.grad_sq) / apart if apart > 0 else math.nan

    @property
    def signal(self) -> float:
        """Unbiased squared norm of the true gradient; may be negative, and is NaN for fewer than two parts."""
        return self.grad_sq - self.noise / self.num_examples

    @property
    def noise_scale(self) -> float:
        """``noise / signal`` in examples (McCandlish et al. 2018); NaN if the signal is not positive."""
        noise, signal = self.noise, self.signal
        return noise / signal if signal > 0 else math.nan

    @property
    def noise_across(self) -> float:
        """The part of ``noise`` orthogonal to the gradient; NaN if ``noise_along`` was not measured."""
        return math.nan if self.noise_along is None else self.noise - self.noise_along

    @property
    def is_finite(self) -> bool:
        """Whether both squared norms are finite."""
        return math.isfinite(self.part_sq) and math.isfinite(self.grad_sq)

    @property
    def euclidean_sq(self) -> float | None:
        """Squared Euclidean norm of the step's gradient; None if ``norm`` is another one and it was not measured."""
        if self.norm == EUCLIDEAN:
            return self.grad_sq
        return None if self.grad_l2 is None else self.grad_l2 * self.grad_l2

    def scaled(self, factor: float) -> GradientMoments:
        """The moments after every gradient was multiplied by ``factor`` (a loss scale, an accumulation divisor)."""

        def times(value: float | None, by: float) -> float | None:
            return None if value is None else value * by

        # The l1 and l2 norms of the gradient are lengths; everything else is a square or a product of two gradients.
        length, square = abs(factor), factor * factor
        return self._replace(
            part_sq=self.part_sq * square,
            grad_sq=self.grad_sq * square,
            noise_along=times(self.noise_along, square),
            grad_l1=times(self.grad_l1, length),
            grad_l2=times(self.grad_l2, length),
            noise_at_quantile=times(self.noise_at_quantile, square),
            layers=None if self.layers is None else {name: each.scaled(factor) for name, each in self.layers.items()},
        )

    def weighted(self, weights: Mapping[str, float]) -> GradientMoments:
        """The moments in the norm in which the square of layer l counts ``weights[l]`` times.

        Args:
            weights: one per layer of ``layers``, which must have been measured.
        """
        assert self.layers is not None, "the layers were not measured"
        return self._replace(
            part_sq=sum(weights[name] * each.part_sq for name, each in self.layers.items()),
            grad_sq=sum(weights[name] * each.grad_sq for name, each in self.layers.items()),
        )

    @classmethod
    def from_noise(
        cls,
        noise: float,
        signal: float,
        *,
        part_size: float,
        num_examples: float,
        noise_along: float | None = None,
    ) -> GradientMoments:
        """The expected moments of a batch of ``num_examples``, given noise and signal.

        Raises:
            ValueError: if the parts are not smaller than the batch, so that they show no noise.
        """
        if not 0 < part_size < num_examples:
            raise ValueError(f"part_size must lie between 0 and num_examples={num_examples}, got {part_size}")
        return cls(
            part_sq=signal + noise / part_size,
            part_size=part_size,
            grad_sq=signal + noise / num_examples,
            num_examples=num_examples,
            # at least two, since a single part has no noise
            num_parts=max(2, round(num_examples / part_size)),
            noise_along=noise_along,
        )


def from_parts(
    parts_sq: ArrayLike,
    sizes: ArrayLike,
    grad_sq: float,
    *,
    weights: ArrayLike | None = None,
) -> GradientMoments:
    """Moments from the squared norm of each part's mean gradient.

    Args:
        parts_sq: ``|g_j|^2``, shape (num_parts,).
        sizes: examples in each part, shape (num_parts,) or a number for all; positive.
        grad_sq: squared norm of the weighted mean of the parts.
        weights: weight of each part in that mean, shape (num_parts,), summing to one; by default ``sizes`` divided by
            their sum, which is the gradient of the mean over examples.

    Raises:
        ValueError: if there are no parts, sizes are not positive, or weights do not sum to one.
    """
    # float64, because the noise is a difference of two squared norms that are nearly equal if the signal dominates
    squares = np.atleast_1d(np.asarray(parts_sq, dtype=np.float64))
    counts = np.broadcast_to(np.asarray(sizes, dtype=np.float64), squares.shape)
    if squares.size == 0:
        raise ValueError("moments need at least one part, got none")
    if not np.all(counts > 0):
        raise ValueError(f"the sizes of parts must be positive, got {counts.tolist()}")
    if weights is None:
        shares = counts / counts.sum()
    else:
        shares = np.broadcast_to(np.asarray(weights, dtype=np.float64), squares.shape)
        # weights that were computed in float32 do not sum to 1 more closely
        if not math.isclose(shares.sum(), 1.0, rel_tol=1e-6):
            raise ValueError(f"the weights of the parts must sum to 1, got a sum of {shares.sum()}")
    return GradientMoments(
        part_sq=float(np.sum(shares * squares)),
        part_size=float(1 / np.sum(shares / counts)),
        grad_sq=float(grad_sq),
        num_examples=float(1 / np.sum(shares**2 / counts)),
        num_parts=int(squares.size),
    )


def from_examples(examples_sq: ArrayLike, products: ArrayLike) -> GradientMoments:
    """Moments from single examples, with the noise along the gradient.

    Args:
        examples_sq: ``s_i = |g_i|^2``, shape (num_examples,).
        products: ``p_i = <g_i, g>`` with the mean gradient ``g``, shape (num_examples,); their mean is ``|g|^2``.

    Raises:
        ValueError: if shapes differ, or there are fewer than two examples.
    """
    squares = np.asarray(examples_sq, dtype=np.float64)
    inner = np.asarray(products, dtype=np.float64)
    if squares.shape != inner.shape or squares.ndim != 1 or squares.size < 2:
        raise ValueError(
            f"need two arrays of the same length, at least 2, got shapes {squares.shape} and {inner.shape}"
        )
    grad_sq = float(inner.mean())
    # var subtracts the mean first: a difference of sums of squares would cancel where the signal dominates
    along = float(inner.var(ddof=1)) / grad_sq if grad_sq > 0 else math.nan
    return from_parts(squares, 1.0, grad_sq)._replace(noise_along=along)


def from_signs(
    deviations: float, grad_l1: float, *, part_size: float, num_examples: float, num_parts: int
) -> GradientMoments:
    """Moments in the norm "sign": the noise is ``(sum_c sigma_c)^2``, the signal ``|G|_1^2``.

    ``sigma_c`` is the standard deviation of coordinate c over single examples. The root of an unbiased variance is too
    small for few parts, so it is divided by its bias for normal parts, 0.80 for two and 0.97 for eight. ``|g|_1`` is
    too large by ``sqrt(2 / pi) sigma_c / sqrt(num_examples)`` in each coordinate without a true gradient, so ``2 / pi``
    of ``noise / num_examples`` is subtracted from its square. The result is zero in pure noise and right in a large
    batch. In between it is too small by at most ``1 - 2 / pi`` if all coordinates are equally noisy, and too large if a
    few hold most of the gradient.

    Args:
        deviations: ``sum_c sqrt(sum_j w_j (g_jc - g_c)^2)``, over coordinates c.
        grad_l1: l1 norm of the step's gradient, ``sum_c |g_c|``.
        part_size, num_examples, num_parts: as in ``GradientMoments``.

    Source: arXiv 2602.03001 for the norm; the paper does not subtract the noise from ``|g|_1``.
    """
    # The deviations are from the mean of the parts already, so nothing is subtracted: with grad_sq = 0 this only
    # divides by 1 / part_size - 1 / num_examples, as for a Euclidean variance.
    plain = GradientMoments(deviations * deviations, part_size, 0.0, num_examples, num_parts).noise
    if math.isnan(plain):
        # One part has no spread. Its noise stays NaN, and the norm of the gradient remains known.
        square = grad_l1 * grad_l1
        return GradientMoments(square, part_size, square, num_examples, num_parts, grad_l1=grad_l1, norm="sign")
    half = (num_parts - 1) / 2
    # lgamma, since gamma overflows from 344 parts on
    noise = plain * half * math.exp(2 * math.lgamma(half) - 2 * math.lgamma(half + 0.5))
    signal = grad_l1 * grad_l1 - 2 / math.pi * noise / num_examples
    moments = GradientMoments.from_noise(noise, signal, part_size=part_size, num_examples=num_examples)
    return moments._replace(num_parts=num_parts, grad_l1=grad_l1, norm="sign")


def from_matrices(
    roots: float,
    nuclear: float,
    *,
    first: float,
    first_size: float,
    part_size: float,
    num_examples: float,
    num_parts: int,
) -> GradientMoments:
    """Moments in the norm "spectral": the noise is ``(sum_l tr C_l^(1/2))^2``, the signal ``(sum_l |G_l|_*)^2``.

    ``C_l`` is the mean of ``(g_i - G) (g_i - G)^T`` of matrix l over single examples, and ``|.|_*`` the nuclear norm,
    the sum of singular values. ``|g|_*`` is too large, because noise fills directions that the true gradient does not
    have. Two sizes show by how much, as for the Euclidean norm: if its square is ``signal + a / b`` at a batch of b, a
    part and the whole batch give the signal. This is right in pure noise, and to first order in a large batch. In
    between, the signal is too small if the gradient has full rank (0.73 of the truth at worst; 32 x 32, equal singular
    values, normal noise), and too large if it has a low rank and the noise has full rank: 3.7 times for rank one with
    five times as much noise, 10 times with fifty.

    Args:
        roots: ``sum_l tr D_l^(1/2)`` with ``D_l = sum_j w_j (g_j - g) (g_j - g)^T`` over the parts.
        nuclear: ``sum_l |g_l|_*`` of the step's gradient.
        first: the same of one part, or the mean over several.
        first_size: examples in that part (the harmonic mean).
        part_size, num_examples, num_parts: as in ``GradientMoments``.

    Source: arXiv 2602.03001 for the norm; the paper does not subtract the noise from ``|g|_*``.
    """
    square = nuclear * nuclear
    noise = GradientMoments(roots * roots, part_size, 0.0, num_examples, num_parts).noise
    signal = GradientMoments(first * first, first_size, square, num_examples, num_parts).signal
    # Neither is of use without the other. Moments of one part at most have NaN for both.
    if math.isnan(noise) or math.isnan(signal):
        return GradientMoments(square, part_size, square, num_examples, min(num_parts, 1), norm="spectral")
    moments = GradientMoments.from_noise(noise, signal, part_size=part_size, num_examples=num_examples)
    return moments._replace(num_parts=num_parts, norm="spectral")
