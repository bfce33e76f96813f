"""How the learning rate follows the batch: the batch factor, relative to a reference batch size.

The learning rate of a step is ``base LR x shape(progress) x batch factor``; these rules give the last of the three.
With ``k = b / b_ref``:

    none     1
    linear   k                    SGD below the noise scale (Goyal et al. 2017)
    sqrt     sqrt(k)              Adam-like methods where noise dominates (Malladi et al. 2022)
    gain     (noise / b_ref + signal) / (noise / b + signal)      SGD in any regime (AdaScale: Johnson et al. 2020)

Under a schedule that runs on examples, "none" is not neutral: each doubling of the batch then acts as a further decay
of the learning rate, by 2 for SGD and sqrt 2 for Adam.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

LRRule = Literal["none", "linear", "sqrt", "gain"]


def check_lr_rule(rule: str) -> None:
    """Raises ValueError for a rule that does not exist."""
    if rule not in get_args(LRRule):
        raise ValueError(f"lr_rule must be one of {', '.join(get_args(LRRule))}, got {rule!r}")


def gain(ratio: float, reference: float, *, noise: float, signal: float) -> float:
    """AdaScale's gain ``(noise / b_ref + signal) / (noise / b + signal)``, between 1 and ``ratio = b / b_ref``.

    Args:
        ratio: batch size over reference batch size, positive.
        reference: the reference batch size, in examples.
        noise, signal: per-example noise and squared gradient norm. Without signal the gain is ``ratio``, without noise
            it is 1; not finite (nothing measured yet) is 1.

    Source: Johnson et al. 2020 (AdaScale SGD), section 3.
    """
    if not (math.isfinite(noise) and math.isfinite(signal)) or noise <= 0:
        return 1.0
    if signal <= 0:
        return ratio
    # The signal's share of the reference batch's gradient: no sum of large squares that could overflow into NaN.
    share = 1 / (1 + noise / reference / signal)
    value = ratio / (1 + (ratio - 1) * share)
    return min(max(value, min(1.0, ratio)), max(1.0, ratio))


def lr_factor(
    rule: LRRule,
    global_batch_size: float,
    *,
    reference: float,
    noise: float = math.nan,
    signal: float = math.nan,
) -> float:
    """The batch factor of a step of ``global_batch_size`` examples.

    Args:
        rule: one of "none", "linear", "sqrt", "gain".
        global_batch_size: examples of the step, positive.
        reference: the batch size for which the base LR was chosen; there the factor is 1.
        noise, signal: averages in per-example units, read by "gain" only.

    Raises:
        ValueError: an unknown rule, or sizes that are not positive.
    """
    check_lr_rule(rule)
    if not (0 < global_batch_size < math.inf and 0 < reference < math.inf):
        raise ValueError(
            f"batch sizes must be positive and finite, got {global_batch_size} and the reference {reference}"
        )
    ratio = global_batch_size / reference
    if rule == "linear":
        return ratio
    if rule == "sqrt":
        return math.sqrt(ratio)
    if rule == "gain":
        return gain(ratio, reference, noise=noise, signal=signal)
    return 1.0
