"""What an example is worth in a batch, and what any choice of batches can win over a constant one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def efficiency(global_batch_size: float, noise_scale: float, *, reference: float = 0.0) -> float:
    """Progress of an example, over that of one in a batch of ``reference``.

        (noise_scale + reference) / (noise_scale + global_batch_size)

    Against small batches (``reference=0``) this is ``1 / (1 + b / B)``: a half at the noise scale, and ``eta^2`` where
    the norm test at ``eta`` comes to rest. 1 where batch and noise scale are both zero, or the noise scale is infinite.

    Args:
        global_batch_size: b, in examples.
        noise_scale: B, in examples.
        reference: in examples.

    Source: McCandlish et al. 2018, equation 2.11; Pollux (Qiao et al. 2021), section 3.1.
    """
    whole = noise_scale + global_batch_size
    return 1.0 if whole == 0 or math.isinf(noise_scale) else (noise_scale + reference) / whole


def adaptive_limit(noise_scales: ArrayLike, batch_sizes: ArrayLike | None = None) -> float:
    """The most that any batch which follows the noise scale can win over the best constant one: ``<B> / <sqrt B>^2``.

    With S steps and E examples to the same loss, over the fewest possible of each, ``(S / S_min - 1) (E / E_min - 1)``
    is 1 for the best constant batches and one over this limit for the best that vary: so at equal examples (or steps)
    they save at most this factor of the excess steps (or examples). It is 1 where the noise scale never changes, 1.13
    where it rises steadily from nothing, and never below 1 (Cauchy and Schwarz).

    Args:
        noise_scales: B at the steps of a run, in examples, shape (num_steps,). Those that are not positive and finite
            are left out.
        batch_sizes: the batch of each step, in examples, shape (num_steps,). The averages are over progress, and a step
            of b examples makes ``b / (b + B)`` of that of one without noise. None counts all steps alike.

    Returns:
        The limit; NaN without a noise scale to go by.

    Raises:
        ValueError: shapes that differ, or batches that are not positive.

    Source: McCandlish et al. 2018, appendix D.
    """
    scales = np.atleast_1d(np.asarray(noise_scales, dtype=np.float64))
    weights = np.ones_like(scales)
    usable = np.isfinite(scales) & (scales > 0)
    if batch_sizes is not None:
        sizes = np.atleast_1d(np.asarray(batch_sizes, dtype=np.float64))
        if sizes.shape != scales.shape:
            raise ValueError(f"need a batch size for each noise scale, got shapes {sizes.shape} and {scales.shape}")
        if not np.all(sizes > 0):
            raise ValueError(f"batch sizes must be positive, got {sizes.min()}")
        weights = sizes / (sizes + np.where(usable, scales, 0.0))
    if not usable.any():
        return math.nan
    scales, weights = scales[usable], weights[usable] / weights[usable].sum()
    return float(weights @ scales / (weights @ np.sqrt(scales)) ** 2)
