"""How much an example is worth in a batch, and how much a varying batch can gain over a constant one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from adabatch.arguments import checked, number, require


def efficiency(global_batch_size: float, noise_scale: float, *, reference: float = 0.0) -> float:
    """Progress per example, relative to that in a batch of ``reference``.

        (noise_scale + reference) / (noise_scale + global_batch_size)

    Relative to small batches (``reference=0``) this is ``1 / (1 + b / B)``: a half at the noise scale, and ``eta^2`` at
    the batch at which the norm test comes to rest. It is 1 if batch and noise scale are both zero, or the noise scale
    is infinite.

    Args:
        global_batch_size: b, in examples.
        noise_scale: B, in examples.
        reference: in examples.

    Source: McCandlish et al. 2018, equation 2.11; Pollux (Qiao et al. 2021), section 3.1.
    """
    given = {"global_batch_size": global_batch_size, "noise_scale": noise_scale, "reference": reference}
    for name, size in given.items():
        if not isinstance(size, float) or not math.isnan(size):  # NaN is that of a run that has measured nothing yet
            number(name, size, at_least=0, at_most=math.inf)
    whole = noise_scale + global_batch_size
    return 1.0 if whole == 0 or math.isinf(noise_scale) else (noise_scale + reference) / whole


@checked
def adaptive_limit(noise_scales: ArrayLike, batch_sizes: ArrayLike | None = None) -> float:
    """The largest gain of a batch that follows the noise scale over the best constant one: ``<B> / <sqrt B>^2``.

    With S steps and E examples to the same loss, relative to the fewest possible of each,
    ``(S / S_min - 1) (E / E_min - 1)`` is 1 for the best constant batches, and one over this limit for the best varying
    batches. At equal examples (or steps) a varying batch thus reduces the excess steps (or examples) by at most this
    factor. The limit is 1 if the noise scale is constant, 1.13 if it rises linearly from zero, and never below 1
    (Cauchy and Schwarz).

    Args:
        noise_scales: B at the steps of a run, in examples, shape (num_steps,). Those that are not positive and finite
            are left out.
        batch_sizes: the batch of each step, in examples, shape (num_steps,). The averages are then over progress: a
            step of b examples makes ``b / (b + B)`` of the progress of a step without noise. None weighs all steps
            equally.

    Returns:
        The limit; NaN if no noise scale is usable.

    Raises:
        ValueError: if shapes differ, or batches are not positive.

    Source: McCandlish et al. 2018, appendix D.
    """
    scales = np.atleast_1d(np.asarray(noise_scales, dtype=np.float64))
    weights = np.ones_like(scales)
    usable = np.isfinite(scales) & (scales > 0)
    if batch_sizes is not None:
        sizes = np.atleast_1d(np.asarray(batch_sizes, dtype=np.float64))
        if sizes.shape != scales.shape:
            raise ValueError(
                f"batch_sizes must be one for each of noise_scales: need a batch size for each noise scale, got "
                f"shapes {sizes.shape} and {scales.shape}"
            )
        require(bool(np.all(sizes > 0)), "batch_sizes: batch sizes must be positive", sizes.min())
        # unusable scales are dropped below; zero keeps their weights free of NaN until then
        weights = sizes / (sizes + np.where(usable, scales, 0.0))
    if not usable.any():
        return math.nan
    scales, weights = scales[usable], weights[usable] / weights[usable].sum()
    return float(weights @ scales / (weights @ np.sqrt(scales)) ** 2)
