"""A schedule from recorded gradient norms, and last-iterate guarantees for any online learner.

Let ``z_1..z_T`` be the iterates of an online learner that gets the gradients ``g_t`` times positive weights
``w_t``. Move the real iterate by a part of each of its moves, where ``w_{a:b}`` is the sum over a..b:

    x_1 = z_1            x_{t+1} - x_t = (w_{t+1:T} / w_{1:T}) (z_{t+1} - z_t)

Then ``E[f(x_T) - f(u)] <= E[sum_t w_t <g_t, z_t - u>] / w_{1:T}`` for convex f: the learner's regret becomes
a guarantee for the last iterate, with the same constants. For SGD, ``z_{t+1} = z_t - w_t g_t``, the factors are
``w_t w_{t+1:T} / w_{1:T}``, and the guarantee ``(D^2 + sum_t w_t^2 G_t^2) / (2 w_{1:T})`` is smallest for ``w_t``
proportional to ``G_t^-2``. The norms of a run thus give the schedule of the next one: warm-up while gradients are
large, and annealing by the second factor.

Source: Defazio, Cutkosky, Mehta and Mishchenko 2023, arXiv:2310.07831, conversion theorem and Algorithms 1
and 2; with general weights: Defazio et al. 2024, arXiv:2405.15682, appendix B. The proof requires weights that
do not depend on the noise that they weigh, hence the smoothed norms of a *previous* run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from adabatch.arguments import MOST_STEPS, checked, require, require_one_of
from adabatch.lr.shapes import FloatArray, Shape, tabulated

OptimizerKind = Literal["sgd", "adam", "adagrad"]

POWERS: Mapping[OptimizerKind, int] = MappingProxyType({"sgd": 2, "adam": 1, "adagrad": 1})
"""The power in ``weight = norm ** -power`` for each kind of optimizer."""


@checked
def refine(
    norms: ArrayLike, kind: OptimizerKind = "sgd", *, smoothing: float = 0.1, length: int | None = None
) -> Shape:
    """The schedule that a finished run's gradient norms ask for: ``w_t * sum_{p>t} w_p``, with maximum 1.

    The norms are median-filtered first, because a single tiny norm would otherwise dominate the schedule. The base
    learning rate must be tuned again for the new shape (``bound.transfer`` predicts it). The shape includes its own
    warm-up if the norms ask for one. Entry t of n is at progress ``t / (n - 1)``, from t = 0; the last is exactly 0.

    Args:
        norms: one per step, or at equal distances of progress, shape (n,) with n >= 2: of the gradient that
            is reduced over ranks and unscaled, *before* clipping (a clipped norm hides the spikes that ask
            for warm-up). Which norm depends on ``kind``. Their scale does not matter.
        kind: the optimizer, and the weights that its theory asks for:

            - ``"sgd"``: ``w = 1 / G^2`` from l2 norms (momentum or not).
            - ``"adam"``: ``w = 1 / G`` from l1 norms, ``sum_i |g_i|``.
            - ``"adagrad"``: ``w = 1 / G`` from norms in the optimizer's own metric, ``sum_i g_i^2 / r_i``
              with ``r_i`` the root mean square of coordinate i over the run. If only the l1 norm was
              recorded it is used instead; both are equal if every ``|g_i|`` stays near its ``r_i``.

        smoothing: length of the median filter's window as a share of n, in [0, 1]; below 2 / n there is no filter.
            The default is that of the authors' code.
        length: entries of the table to make, at least 2; by default n. Norms logged at every step of a long
            run need no table of that length.

    Raises:
        ValueError: if there are fewer than two norms, a norm is zero, negative, infinite or NaN, or the kind is
            unknown.

    It does not correct for a batch that grew while the norms were recorded. The shape then already includes the
    growth, and a rule that scales the learning rate by the batch would count it twice.
    """
    values = _norms(norms)
    require(0 <= smoothing <= 1, "smoothing must lie in [0, 1], a share of the norms", smoothing)
    weights = refined_weights(median_filter(values, odd_window(smoothing, values.size)), kind)
    # the sum over *later* steps, so the last factor is 0
    factors = weights * _tails(weights)[1:]
    factors /= factors.max()
    return tabulated(values=(factors if length is None else stretch(factors, length)).tolist())


@checked
def refined_weights(norms: ArrayLike, kind: OptimizerKind = "sgd") -> FloatArray:
    """The weights ``G_t^-2`` (sgd) or ``G_t^-1`` (adam, adagrad); the median norm has weight 1.

    For SGD with distance D and norms G, the weights with the least guarantee are these, scaled to
    ``D / (G_t^2 sqrt(sum_p G_p^-2))``.

    Args:
        norms: shape (n,); see ``refine`` for the choice of the norm.
        kind: the optimizer.

    Raises:
        ValueError: as for ``refine``, or if norms differ so much that the weights leave the range of float64.
    """
    values = _norms(norms)
    require_one_of("kind", kind, POWERS)
    # the result does not depend on the scale; without it a product of weights is a fourth power of the norms
    relative = values / np.median(values)
    # reported below, in words
    with np.errstate(over="ignore", divide="ignore"):
        weights = relative ** -POWERS[kind]
    if not np.all(np.isfinite(weights)) or weights.min() == 0:
        raise ValueError(
            f"norms from {values.min():g} to {values.max():g} give weights beyond float64: smooth them, or "
            "leave out the steps that were not trained on"
        )
    return weights


@checked
def last_iterate_multipliers(weights: ArrayLike) -> FloatArray:
    """The factors on the updates of any optimizer: ``w_{t+1:T} / w_{1:T}``, t = 1..T, shape (T,).

    For constant weights they are ``1 - t / T``, linear decay. The last is 0, because its update comes after the
    iterate of the guarantee. For SGD whose gradients are not weighted, multiply by the weights too.

    Args:
        weights: ``w_t``, shape (T,), not negative and not all zero; the weights that multiply the gradients.

    Raises:
        ValueError: if the weights are out of this range.
    """
    tails = _tails(_weights(weights))
    return np.asarray(tails[1:] / tails[0])


@checked
def to_last_iterate(iterates: ArrayLike, weights: ArrayLike) -> FloatArray:
    """The iterates x of the conversion from the iterates z of an online learner.

    Args:
        iterates: ``z_1..z_T``, shape (T, ...).
        weights: ``w_1..w_T``, shape (T,), not negative and not all zero.

    Returns:
        ``x_1..x_T``, of the shape of ``iterates``.

    Raises:
        ValueError: if the weights are out of their range, or their number is not that of the iterates.
    """
    z = np.asarray(iterates, dtype=np.float64)
    multipliers = last_iterate_multipliers(weights)
    if z.ndim < 1 or z.shape[0] != multipliers.size:
        raise ValueError(f"need one weight per iterate, got {multipliers.size} weights for iterates of shape {z.shape}")
    # one factor for all coordinates of an iterate
    moves = multipliers[:-1].reshape(-1, *(1,) * (z.ndim - 1)) * np.diff(z, axis=0)
    return np.concatenate([z[:1], z[:1] + np.cumsum(moves, axis=0)])


@checked
def last_iterate_guarantee(weights: ArrayLike, norms: ArrayLike = 1.0, *, distance: float = 1.0) -> float:
    """The guarantee for the last iterate of SGD with the factors ``w_t w_{t+1:T} / w_{1:T}``.

    It is ``(D^2 + sum_t w_t^2 G_t^2) / (2 w_{1:T})`` above the minimum.

    It is sharper than ``bound.bound`` of the same factors, because it uses the weights from which they came.

    Args:
        weights: ``w_t``, shape (T,), not negative and not all zero. Their scale matters: it is the base
            learning rate.
        norms: l2 norms ``G_t``, shape (T,) or a number.
        distance: from the start to a minimiser, ``D``.

    Raises:
        ValueError: if the weights are out of their range, or the norms do not fit them.
    """
    require(0 < distance < math.inf, "distance must be positive and finite", distance)
    w = _weights(weights)
    sizes = np.asarray(norms, dtype=np.float64)
    if sizes.shape not in ((), w.shape):
        raise ValueError(f"norms must be a number or as many as the {w.size} weights, got shape {sizes.shape}")
    if not (np.isfinite(sizes) & (sizes >= 0)).all():
        raise ValueError("norms must be finite and not negative: leave out the steps that were skipped")
    return float((distance**2 + np.sum((w * sizes) ** 2)) / (2 * np.sum(w)))


@checked
def stretch(values: ArrayLike, length: int) -> FloatArray:
    """Resample to ``length`` entries by linear interpolation in progress; the first and last are kept.

    Entry i of n is at progress ``i / (n - 1)``. Use this if a run had another number of steps, or norms were
    logged at an interval (repeating each of them would shift them and create steps).

    Args:
        values: shape (n,), n >= 1.
        length: number of entries, at least 2, or 1 if n is 1.

    Raises:
        ValueError: if there are no values, or the length is too short to keep both ends.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1 or table.size == 0:
        raise ValueError(f"values must be a flat array of at least one, got shape {table.shape}")
    require(length <= MOST_STEPS, f"length must be at most {MOST_STEPS}", length)
    require(length >= min(2, table.size), "length must be at least 2 to keep the first and the last value", length)
    return np.interp(np.linspace(0, table.size - 1, length), np.arange(table.size), table)


def odd_window(smoothing: float, count: int) -> int:
    """The window of a median filter over a share ``smoothing`` of ``count`` values: odd, so that it has a middle."""
    return 2 * (int(smoothing * count) // 2) + 1


@checked
def median_filter(values: ArrayLike, window: int) -> FloatArray:
    """Running median: ``out[i]`` is that of ``values[i - h .. i + h]``, ``h = (window - 1) / 2``.

    Beyond the left edge the first value is repeated, so that a spike at the start is kept; beyond the right
    edge the values are mirrored without repeating the last. Exact, O(n log n) for any window, in numpy only.

    Args:
        values: shape (n,), n >= 1, finite.
        window: odd, at most ``2 n - 1``.

    Raises:
        ValueError: if values are not finite, or the window is even or too long.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or series.size == 0 or not np.all(np.isfinite(series)):
        raise ValueError("values must be a flat array of at least one, all finite")
    # mirroring without the last value adds n - 1 values at most
    if window < 1 or window % 2 == 0 or window > 2 * series.size - 1:
        raise ValueError(
            f"window must be odd and within 1 to {2 * series.size - 1} for {series.size} values, got {window}"
        )
    half = window // 2
    if half == 0:
        return series.copy()
    # as in the authors' code: repeated on the left, mirrored on the right
    padded = np.concatenate([np.full(half, series[0]), series, series[-2 : -2 - half : -1]])
    return _running_order_statistic(padded, window, half)


def _running_order_statistic(values: FloatArray, window: int, order: int) -> FloatArray:
    """The ``order``-th smallest (from 0) of every window, all windows at once."""
    # A wavelet matrix: values become ranks, and the wanted rank is found bit by bit, from the highest. At each bit the
    # ranks are split stably into those without and those with the bit, and zeros[i], the number of the former before
    # place i, maps every window's interval into either half.
    # Not two heaps, which are O(n log window) too, but in Python loops; and not scipy's, since scipy is no dependency.
    by_rank = np.argsort(values, kind="stable")
    ranks = np.empty(values.size, dtype=np.int32)
    ranks[by_rank] = np.arange(values.size, dtype=np.int32)
    start = np.arange(values.size - window + 1, dtype=np.int32)
    stop = start + np.int32(window)
    wanted = np.full_like(start, order)
    found = np.zeros_like(start)
    zeros = np.zeros(values.size + 1, dtype=np.int32)
    for bit in reversed(range(int(values.size - 1).bit_length())):
        has_bit = (ranks & (1 << bit)) != 0
        np.cumsum(~has_bit, out=zeros[1:])
        before_start, before_stop = zeros[start], zeros[stop]
        without = before_stop - before_start
        low = wanted < without
        np.subtract(wanted, without, out=wanted, where=~low)
        # in the half with the bit, intervals come after all ranks without it
        start += zeros[-1] - before_start
        stop += zeros[-1] - before_stop
        np.copyto(start, before_start, where=low)
        np.copyto(stop, before_stop, where=low)
        found |= (~low).astype(np.int32) << bit
        ranks = np.concatenate([ranks[~has_bit], ranks[has_bit]])
    return values[by_rank[found]]


def _tails(weights: FloatArray) -> FloatArray:
    """``w_{t:T}`` for t = 1..T + 1, shape (T + 1,): one reverse sum, without differences of sums."""
    return np.append(np.cumsum(weights[::-1])[::-1], 0.0)


def _weights(weights: ArrayLike) -> FloatArray:
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or not np.all(np.isfinite(w) & (w >= 0)) or not np.any(w):
        raise ValueError("weights must be a flat array of finite numbers that are not negative and not all zero")
    return w


def _norms(norms: ArrayLike) -> FloatArray:
    values = np.asarray(norms, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"refining needs the norms of at least 2 steps, in a flat array, got shape {values.shape}")
    bad = ~(np.isfinite(values) & (values > 0))
    if np.any(bad):
        first = int(np.argmax(bad))
        raise ValueError(
            f"gradient norms must be positive and finite, got {values[first]} at {first} "
            f"({int(bad.sum())} such of {values.size}): leave out the steps that were skipped"
        )
    return values
