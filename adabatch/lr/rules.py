"""How the learning rate follows the batch: the batch factor, relative to a reference batch size.

The learning rate of a step is ``base LR x shape(progress) x batch factor``; these rules give the last of the three.
With ``k = b / b_ref``:

    none       1
    linear     k                    SGD below the noise scale (Goyal et al. 2017)
    sqrt       sqrt(k)              Adam-like methods where noise dominates (Malladi et al. 2022)
    gain       (noise / b_ref + signal) / (noise / b + signal)    SGD in any regime (AdaScale: Johnson et al. 2020)
    sqrt_gain  the square root of that                            Adam-like methods in any regime (AdaptDL)

Under a schedule that runs on examples, "none" is not neutral: each doubling of the batch then acts as a further decay
of the learning rate, by 2 for SGD and sqrt 2 for Adam. A criterion may have its own decay (``Seesaw``), which
multiplies the factor of every rule except "none"; see ``lr.follow``.

Other settings of Adam-like methods may follow too (``followed``), so that their memory and decay stay constant in
examples: betas, eps and decoupled weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args, overload

from adabatch.arguments import checked, require, require_one_of, require_type
from adabatch.batch.plan import Duration

LRRule = Literal["none", "linear", "sqrt", "gain", "sqrt_gain"]
NOISE_RULES: frozenset[str] = frozenset({"gain", "sqrt_gain"})
"""Rules that read the noise, so that a probe must measure it."""

Setting = Literal["betas", "eps", "weight_decay"]


def check_lr_rule(rule: str) -> None:
    """Raises a ValueError if the rule is unknown."""
    # an old name, which a config may still have
    if isinstance(rule, str) and rule == "seesaw":
        raise ValueError(
            "lr_rule='seesaw' is now lr_rule='sqrt' (or 'linear' with SGD), with the criterion Seesaw(...), which "
            "brings its decay of the learning rate itself: leave lr_rule out, or give one of those"
        )
    require_one_of("lr_rule", rule, LRRule)


def check_follow(names: Collection[str]) -> None:
    """Raises a ValueError for a setting that cannot follow the batch, and a TypeError if ``names`` is a string."""
    if isinstance(names, str):
        raise TypeError(f"follow takes a collection of settings, such as ({names!r},), got {names!r}")
    # mappings and arrays are collections too, but not of names
    words = (
        isinstance(names, Collection)
        and not isinstance(names, Mapping)
        and not hasattr(names, "dtype")
        and all(isinstance(name, str) for name in names)
    )
    require_type(words, f"follow must be a collection of settings ({', '.join(get_args(Setting))})", names)
    unknown = sorted(set(names) - set(get_args(Setting)))
    if unknown:
        raise ValueError(f"follow takes {', '.join(get_args(Setting))}, got {', '.join(map(repr, unknown))}")


def gain(ratio: float, reference: float, *, noise: float, signal: float) -> float:
    """AdaScale's gain ``(noise / b_ref + signal) / (noise / b + signal)``, between 1 and ``ratio = b / b_ref``.

    Args:
        ratio: batch size over reference batch size, positive.
        reference: the reference batch size, in examples.
        noise, signal: per-example noise and squared gradient norm. Without signal the gain is ``ratio``, without noise
            it is 1. If they are not finite (nothing was measured yet), it is 1.

    Source: Johnson et al. 2020 (AdaScale SGD), section 3.
    """
    if not (math.isfinite(noise) and math.isfinite(signal)) or noise <= 0:
        return 1.0
    if signal <= 0:
        return ratio
    # The signal's share of the reference batch's gradient. The formula above adds large squares, whose sum could
    # overflow and make the quotient NaN.
    share = 1 / (1 + noise / reference / signal)
    value = ratio / (1 + (ratio - 1) * share)
    # rounding must not leave the range between 1 and the ratio
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
        rule: one of "none", "linear", "sqrt", "gain", "sqrt_gain".
        global_batch_size: examples of the step, positive.
        reference: the batch size for which the base LR was tuned, and at which the factor is 1.
        noise, signal: averages in per-example units, read by "gain" and "sqrt_gain" only.

    Raises:
        ValueError: if the rule is unknown, or sizes are not positive.
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
    if rule == "sqrt_gain":
        return math.sqrt(gain(ratio, reference, noise=noise, signal=signal))
    # "none", the only one left of those that were checked
    return 1.0


def followed(
    settings: Mapping[str, Any],
    names: Collection[str],
    *,
    ratio: float,
    factor: float,
    exponents: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Settings of an optimizer's parameter group for a step of ``ratio`` reference batches.

        betas          beta ** ratio              the averages forget equally per example (Marek et al. 2025)
        eps            eps / sqrt(ratio)          as the square root of the second moment falls (Malladi et al. 2022)
        weight_decay   wd * ratio / factor        lr * wd decays equally per example, whatever the LR does

    Args:
        settings: the group's values at the reference batch size.
        names: which of them follow.
        ratio: batch size over reference batch size, positive.
        factor: the factor of the rule in the same step, positive; without the decay of a ``Seesaw``, which applies to
            weight decay as to the learning rate, down to zero.
        exponents: those of the betas, if floors limit some of them; by default ``ratio`` for each.

    Returns:
        The settings that change, by name.

    Raises:
        ValueError: if the ratio or the factor is not positive.
    """
    for name, value in (("ratio", ratio), ("factor", factor)):
        require(0 < value < math.inf, f"{name} must be positive and finite", value)
    new: dict[str, Any] = {}
    if "betas" in names:
        betas = settings["betas"]
        powers = [ratio] * len(betas) if exponents is None else exponents
        new["betas"] = tuple(beta**power for beta, power in zip(betas, powers, strict=True))
    if "eps" in names:
        new["eps"] = settings["eps"] / math.sqrt(ratio)
    if "weight_decay" in names:
        # the optimizer multiplies the decay by the learning rate, which has the factor already
        new["weight_decay"] = settings["weight_decay"] * ratio / factor
    return new


@overload
def legw_warmup(warmup: Duration, ratio: float) -> Duration: ...
@overload
def legw_warmup(warmup: float, ratio: float) -> float: ...
@checked
def legw_warmup(warmup: Duration | float, ratio: float) -> Duration | float:
    """The warm-up for a batch ``ratio`` times as large: the same number of steps, so ``ratio`` times the examples.

    It is meant for the sqrt rule. A warm-up that is given in steps does not change.

    Args:
        warmup: tuned for the reference batch size; a number is a share of a total in examples or tokens.
        ratio: batch size over reference batch size, positive.

    Raises:
        ValueError: if the ratio is out of its range, a share is not below 1 before and after, or the warm-up is in
            gain-steps, whose number of steps depends on the noise.

    Source: You et al. 2019, "Large-batch training for LSTM and beyond" (LEGW), section 3.
    """
    require(0 < ratio < math.inf, "ratio must be positive and finite", ratio)
    if isinstance(warmup, int | float):
        if not (0 <= warmup < 1 and warmup * ratio < 1):
            raise ValueError(
                f"a warm-up of the share {warmup} of the total is {warmup * ratio} of it at {ratio} times the batch: "
                f"both must lie in [0, 1); give a smaller share, or a duration"
            )
        return warmup * ratio
    if warmup.unit == "steps":
        return warmup
    if warmup.unit == "gain_steps":
        raise ValueError(f"a warm-up of {warmup} already depends on the batch: give it in examples, tokens or steps")
    return Duration(round(warmup.count * ratio), warmup.unit)
