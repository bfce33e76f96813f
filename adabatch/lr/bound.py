"""The last-iterate bound of convex theory, and the best base learning rate of a schedule according to it.

A schedule takes steps ``gamma * eta_t``, t = 1..T: factors ``eta`` and base learning rate ``gamma``. With
``G_t`` the gradient's norm at step t and ``D`` the distance from the start to a minimiser, SGD on a convex
function (smooth or not, no momentum, no weight decay) has ``E f(x_T) - f* <= T1 / gamma + gamma * T2`` with

    T1 = D^2 / (2 eta_{1:T})            T2 = 1/2 sum_t eta_t^2 G_t^2 / eta_{min(t+1,T):T}

    best base learning rate  sqrt(T1 / T2)            bound there  2 sqrt(T1 T2)

where ``eta_{a:b}`` is the sum over a..b.

This is Theorem 10 of Defazio et al. (2023, arXiv:2310.07831, appendix F) as evaluated by Schaipp et al.
(2025, arXiv:2501.18965), whose triple sum telescopes by
``eta_k / (eta_{k+1:T} eta_{k:T}) = 1 / eta_{k+1:T} - 1 / eta_{k:T}``: O(T) instead of O(T^2), and no
difference of nearly equal sums.

**What it is for**: comparing shapes, ratios of base learning rates, and horizons. Its absolute value is not
a loss (for linear decay it is twice what that schedule's own theorem gives). Bounds can be compared at equal
T and G only; across batch sizes, include the noise of the batch in ``G_t``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adabatch.arguments import MOST_STEPS, checked, require
from adabatch.lr.function_shape import AnyShape
from adabatch.lr.refine import stretch
from adabatch.lr.shapes import Decay, Shape, warmup_factor, wsd


class BoundTerms(NamedTuple):
    """The two terms of a bound ``distance / base_lr + base_lr * gradient``.

    Args:
        distance: T1, how far the start is from a minimiser.
        gradient: T2, the cost of the gradients' size and noise.
    """

    distance: float
    gradient: float

    @property
    def best_base_lr(self) -> float:
        """The base learning rate with the least bound, ``sqrt(T1 / T2)``: proportional to ``D / G``."""
        return math.sqrt(self.distance / self.gradient)

    @property
    def best(self) -> float:
        """The bound at ``best_base_lr``, ``2 sqrt(T1 T2)``: proportional to ``D * G``."""
        # two roots, because the product of the terms may leave the range of float64
        return 2 * math.sqrt(self.distance) * math.sqrt(self.gradient)

    @checked
    def at(self, base_lr: float) -> float:
        """The bound at ``base_lr``.

        Raises:
            ValueError: if the base learning rate is not positive.
        """
        require(0 < base_lr < math.inf, "base_lr must be positive and finite", base_lr)
        return self.distance / base_lr + base_lr * self.gradient


class CooldownLimits(NamedTuple):
    """Limits for long runs with a linear cooldown and constant gradient norm.

    Args:
        best_base_lr: best base learning rate, in units of ``D / (G sqrt(T))``.
        bound: the bound there, in units of ``D G / sqrt(T)``.
    """

    best_base_lr: float
    bound: float


class Extension(NamedTuple):
    """How to continue a finished run so that its base learning rate is right for the longer run.

    Load the checkpoint of ``resume_step``, multiply the base learning rate by ``lr_factor``, and run
    ``num_steps`` more steps with ``shape``, after a ramp of ``ramp_steps`` (a warm-up that starts at ``1 /
    lr_factor``).

    Args:
        resume_step: number of optimizer steps before the checkpoint to load, where the learning rate was still full.
        num_steps: optimizer steps from there to the end, ramp included.
        lr_factor: factor on the base learning rate.
        ramp_steps: steps over which that factor is introduced linearly; 0 for at once.
        shape: shape over the progress from the ramp's end to the end.
        cooldown: length of the cooldown as a share of the whole longer run after its warm-up.
        best_base_lr_ratio: best base learning rate of the longer run over that of the finished one. 1 if they
            match; below 1 if even a cooldown over the whole run cannot raise it enough.
        terms: bound of the longer run, for gradient norm 1 and distance 1.
    """

    resume_step: int
    num_steps: int
    lr_factor: float
    ramp_steps: int
    shape: Shape
    cooldown: float
    best_base_lr_ratio: float
    terms: BoundTerms


@checked
def discretize(
    shape: AnyShape, num_steps: int, *, warmup_steps: int = 0, warmup_start: float = 0.0
) -> NDArray[np.float64]:
    """The factors of a run of equal steps, shape (num_steps,): each step reads the progress made before it.

    Entry t = 0.. is ``warmup_factor(t / warmup_steps, warmup_start) * shape(0)`` while t is below
    ``warmup_steps``, then ``shape((t - warmup_steps) / (num_steps - warmup_steps))``. Progress 1 would be the
    entry after the last, so a shape that decays to zero has no zero here, as the bound requires. A cooldown
    is not rounded to whole steps: it may begin between two of them.

    Args:
        shape: over the steps after the warm-up.
        num_steps: all steps, warm-up included.
        warmup_steps: length of the warm-up, less than ``num_steps``; 0 for no warm-up.
        warmup_start: first factor of the warm-up, a ratio of the base learning rate.

    Raises:
        ValueError: if there are no steps, or the warm-up leaves none.
    """
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got num_steps={num_steps}")
    require(num_steps <= MOST_STEPS, f"num_steps must be at most {MOST_STEPS:,}", num_steps)
    require(0 <= warmup_start < math.inf, "warmup_start must be finite and not negative", warmup_start)
    check_warmup(warmup_steps, num_steps)
    step = np.arange(num_steps, dtype=np.float64)
    # Negative progress, during the warm-up, is clamped to 0, so this is shape(0) there.
    factors = shape((step - warmup_steps) / (num_steps - warmup_steps))
    if warmup_steps:
        # in place, since a shape returns an array of its own
        factors *= warmup_factor(step / warmup_steps, warmup_start)
    return factors


def check_warmup(warmup_steps: int, num_steps: int) -> None:
    """Refuses a warm-up that leaves no step after it."""
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, {num_steps - 1}] for {num_steps} steps, got {warmup_steps}: "
            "shorten the warm-up or lengthen the run"
        )


@checked
def bound_terms(factors: ArrayLike, norms: ArrayLike = 1.0, *, distance: float = 1.0) -> BoundTerms:
    """The last-iterate bound of a schedule, split in its two terms; the head of this module has the formula.

    Time and memory are O(T). The bound after the first t steps is that of ``factors[:t]``.

    Args:
        factors: ``eta_t`` at base learning rate 1, shape (T,), not negative. Zeros at the end are removed, because
            nothing changes there and the bound would be infinite. A shape whose floor is an absolute learning
            rate changes with the base learning rate, and ``best_base_lr`` does not hold for it.
        norms: ``G_t``, shape (T,) or a number for all, not negative.
        distance: ``D``, positive.

    Raises:
        ValueError: if numbers are out of these ranges, shapes differ, or all factors or gradients are zero.
    """
    eta, squares = _validated(factors, norms, distance)
    # Summed from the end, so that the small sums there keep their digits; a difference of sums from the start would
    # lose them.
    tail = np.cumsum(eta[::-1])[::-1]
    # the last step has no later ones, and counts with its own sum
    after = np.append(tail[1:], tail[-1])  # eta_{min(t+1,T):T}
    # the quotient first: the square of a tiny factor would underflow
    return _terms(distance * distance / (2 * tail[0]), float(np.sum(eta * (eta / after) * squares)) / 2)


@checked
def bound(factors: ArrayLike, norms: ArrayLike = 1.0, *, base_lr: float = 1.0, distance: float = 1.0) -> float:
    """The last-iterate bound at ``base_lr``; arguments and errors as for ``bound_terms``."""
    return bound_terms(factors, norms, distance=distance).at(base_lr)


@checked
def best_base_lr(factors: ArrayLike, norms: ArrayLike = 1.0, *, distance: float = 1.0) -> float:
    """The base learning rate with the least last-iterate bound; arguments as for ``bound_terms``."""
    return bound_terms(factors, norms, distance=distance).best_base_lr


@checked
def averaged_bound_terms(factors: ArrayLike, norms: ArrayLike = 1.0, *, distance: float = 1.0) -> BoundTerms:
    """The classical bound for the average of the iterates, weighted by their steps, or for the best of them.

        T1 = D^2 / (2 sum_t eta_t)                      T2 = sum_t eta_t^2 G_t^2 / (2 sum_t eta_t)

    It does not concern the last iterate, so a cooldown does not improve it. Arguments and errors as for
    ``bound_terms``.
    """
    eta, squares = _validated(factors, norms, distance)
    total = float(np.sum(eta))
    return _terms(distance * distance / (2 * total), float(np.sum(eta**2 * squares)) / (2 * total))


@checked
def linear_cooldown_limits(cooldown: float) -> CooldownLimits:
    """Limits for T to infinity of the bound of ``wsd(cooldown=c)`` with constant gradient norm.

    With ``l = ln((2 - c) / c)``,

        best base learning rate  sqrt(2 / ((2 - c)(2 + l)))           bound  sqrt((4 + 2 l) / (2 - c))

    Derived from the bound by replacing its sums by integrals. At T = 20,000 the bound's own best base learning rate is
    within 0.13 % of it for a cooldown of 0.05, 0.06 % for 0.2 and more. The ratio of two of these limits transfers a
    tuned base learning rate between cooldowns, at any T.

    Args:
        cooldown: the share of the run that cools down, in (0, 1]. There is no limit for 0: the bound of a
            constant schedule grows as ``sqrt(log T / T)``.

    Raises:
        ValueError: if the cooldown is out of its range.
    """
    require(0 < cooldown <= 1, "cooldown must lie in (0, 1]", cooldown)
    log_ratio = math.log((2 - cooldown) / cooldown)
    return CooldownLimits(
        best_base_lr=math.sqrt(2 / ((2 - cooldown) * (2 + log_ratio))),
        bound=math.sqrt((4 + 2 * log_ratio) / (2 - cooldown)),
    )


@checked
def linear_cooldown_ratio(
    source: AnyShape, target: AnyShape, num_steps: int, target_steps: int | None = None
) -> float | None:
    """The closed form of ``transfer`` for long runs without warm-up at constant norms, as a factor on the base LR.

    Args:
        source, target: shapes.
        num_steps: of the tuned run.
        target_steps: of the new run; by default the same.

    Returns:
        The ratio of the limits from ``linear_cooldown_limits``, or None if one of the shapes is not a linear
        cooldown to zero.
    """
    for name, count in (("num_steps", num_steps), ("target_steps", target_steps)):
        require(count is None or count >= 1, f"{name} must be at least 1", count)
    cooldowns = [_linear_cooldown(shape) for shape in (source, target)]
    # 0 stands for any other shape, which has no closed form
    if not all(cooldowns):
        return None
    old, new = (linear_cooldown_limits(cooldown).best_base_lr for cooldown in cooldowns)
    # both limits are in units of 1 / sqrt(T), each with its own T
    return new / old * math.sqrt(num_steps / (num_steps if target_steps is None else target_steps))


def _linear_cooldown(shape: AnyShape) -> float:
    """The share of a shape that cools down linearly to zero; 0 for all other shapes."""
    # a user's function does not tell its form
    if not isinstance(shape, Shape):
        return 0.0
    settings = shape.settings
    if shape.name == "linear" and settings["floor"] == 0:
        return 1.0
    if shape.name == "wsd" and settings["floor"] == 0 and settings["decay"] == "linear":
        return cast(float, settings["cooldown"])
    return 0.0


@checked
def transfer(
    base_lr: float,
    source: AnyShape,
    target: AnyShape,
    *,
    num_steps: int,
    target_steps: int | None = None,
    norms: ArrayLike = 1.0,
    warmup_steps: int = 0,
    target_warmup_steps: int | None = None,
) -> float:
    """The base learning rate for another shape or horizon: ``base_lr * gamma*(target) / gamma*(source)``.

    The distance to a minimiser and the scale of the gradients cancel, so ``base_lr`` must have been tuned, but
    nothing else about the problem needs to be known.

    Accuracy on the logs of Schaipp et al. 2025 (124M-parameter language models, AdamW): between cooldowns of 0.1
    to 1 at 50,000 steps, 17 of 21 ratios were predicted within 0.05 in log, and the other four (0.1 with 0.4, 0.6,
    0.8 and 0.9) within 0.08. Between lengths it does not hold: the bound predicts ``T ** -0.5``, and runs of 15,000
    to 50,000 steps had exponents of -0.2 to -0.4, so that it lowers the rate too far for a longer run. Tune again if
    the length changes by more than a little, or use the exponent -0.3.

    Args:
        base_lr: tuned for ``source`` over ``num_steps``.
        source, target: shapes, for the same batch size, because another batch has other gradient norms.
        num_steps: steps of the tuned run, warm-up included.
        target_steps: steps of the new run; by default the same. Longer runs get a lower base learning rate, by more
            than measurements support.
        norms: gradient norms of the tuned run at equal distances of progress, of any length, or a number. They are
            assumed to be the same function of progress in the new run, which is not true for a very different shape.
        warmup_steps: of the tuned run; it starts from zero.
        target_warmup_steps: of the new run; by default the same.

    Raises:
        ValueError: if the base learning rate is not positive, and for the reasons of ``discretize`` and
            ``bound_terms``.
    """
    require(0 < base_lr < math.inf, "base_lr must be positive and finite", base_lr)
    require(np.ndim(norms) < 2 and np.size(norms) > 0, "norms must be a number or a flat array", norms)
    for name, count in (("num_steps", num_steps), ("target_steps", target_steps)):
        require(
            count is None or 1 <= count <= MOST_STEPS, f"{name} must be from 1 to {MOST_STEPS}: at least 1 step", count
        )
    there = num_steps if target_steps is None else target_steps
    warmup_there = warmup_steps if target_warmup_steps is None else target_warmup_steps
    require(
        0 <= warmup_there < there,
        f"{'' if target_warmup_steps is None else 'target_'}warmup_steps must lie in [0, {there - 1}]",
        warmup_there,
    )

    def best(shape: AnyShape, steps: int, warmup: int) -> float:
        # the norms as a function of progress, which both lengths share
        profile = norms if np.ndim(norms) == 0 else stretch(norms, steps)
        return best_base_lr(discretize(shape, steps, warmup_steps=warmup), profile)

    return base_lr * best(target, there, warmup_there) / best(source, num_steps, warmup_steps)


@checked
def two_stage(
    num_steps: int,
    new_steps: int,
    *,
    cooldown: float,
    decay: Decay = "linear",
    ramp_steps: int = 0,
    warmup_steps: int = 0,
) -> Extension:
    """Extend a run tuned with ``wsd(cooldown, decay)``: continue from before its cooldown, at a lower rate.

    The factor on the learning rate is the one for which the base learning rate that was best for
    ``num_steps`` is best for ``new_steps`` too. The new cooldown is the same share of the longer run.

    Args:
        num_steps: steps of the finished run, warm-up included.
        new_steps: steps of the extended run, counted from the same start; more than ``num_steps``.
        cooldown: share of the steps after the warm-up that cools down, in both runs, in (0, 1).
        decay: form of the cooldown.
        ramp_steps: steps over which the factor is introduced; they must fit before the new cooldown.
        warmup_steps: of the finished run; it starts from zero.

    Raises:
        ValueError: if numbers are out of these ranges, or no factor matches.

    Source: Schaipp et al. 2025, arXiv:2501.18965, who pick the nearest of 33 factors.
    """
    resume = _last_full_step(num_steps, cooldown, warmup_steps, new_steps)
    rest = new_steps - resume
    cooldown_steps = cooldown * (new_steps - warmup_steps)
    if not 0 <= ramp_steps <= rest - cooldown_steps:
        raise ValueError(
            f"ramp_steps must lie in [0, {math.floor(rest - cooldown_steps)}], got {ramp_steps}: it must end "
            f"before the cooldown of the {new_steps}-step run begins"
        )
    # the same cooldown as a share of what follows the ramp; min, because rounding may carry it past 1
    shape = wsd(cooldown=min(1.0, cooldown_steps / (rest - ramp_steps)), decay=decay)
    finished = discretize(wsd(cooldown=cooldown, decay=decay), num_steps, warmup_steps=warmup_steps)
    goal = best_base_lr(finished)

    def terms(factor: float) -> BoundTerms:
        # The bound of the whole longer run, not of the second stage alone: the steps before it were taken already, and
        # weigh in the distance from the start.
        rise = discretize(shape, rest, warmup_steps=ramp_steps, warmup_start=1 / factor)
        return bound_terms(np.append(finished[:resume], factor * rise))

    # Only downwards: the longer run has the lower best rate, so the factor lies below 1.
    high, low = 1.0, 0.5
    # halved until the root lies between the two
    while math.log(terms(low).best_base_lr / goal) < 0:
        high, low = low, low / 2
        if low < 1e-6:
            raise ValueError(f"no factor makes the base learning rate of {num_steps} steps best for {new_steps}")
    factor = _root(lambda value: math.log(terms(value).best_base_lr / goal), low, high)
    return Extension(
        resume_step=resume,
        num_steps=rest,
        lr_factor=factor,
        ramp_steps=ramp_steps,
        shape=shape,
        cooldown=cooldown,
        best_base_lr_ratio=terms(factor).best_base_lr / goal,
        terms=terms(factor),
    )


@checked
def longer_cooldown(
    num_steps: int, new_steps: int, *, cooldown: float, decay: Decay = "linear", warmup_steps: int = 0
) -> Extension:
    """Extend a run tuned with ``wsd(cooldown, decay)``: keep its learning rate and cool down for longer.

    The new cooldown is the one for which the base learning rate that was best for ``num_steps`` is best for
    ``new_steps`` too. If none is long enough it is the whole run, and ``best_base_lr_ratio`` is below 1. A long
    cooldown may have to begin before that of the finished run; ``resume_step`` is then its beginning, and a
    checkpoint of that step is needed.

    Arguments and errors as for ``two_stage``.

    Source: Schaipp et al. 2025, arXiv:2501.18965. In their logs of 124M and 210M parameters this gained more
    than two stages in the cases that tried both.
    """
    stable = _last_full_step(num_steps, cooldown, warmup_steps, new_steps)
    goal = best_base_lr(discretize(wsd(cooldown=cooldown, decay=decay), num_steps, warmup_steps=warmup_steps))

    def terms(share: float) -> BoundTerms:
        shape = wsd(cooldown=share, decay=decay)
        return bound_terms(discretize(shape, new_steps, warmup_steps=warmup_steps))

    def excess(share: float) -> float:
        return math.log(terms(share).best_base_lr / goal)

    # At the old share the longer run's best rate is too low, and it rises with the cooldown, so the root lies between.
    share = 1.0 if excess(1.0) < 0 else _root(excess, cooldown, 1.0)
    cooldown_steps = share * (new_steps - warmup_steps)
    # no later than the old cooldown, from which on the rate of the finished run was no longer full
    resume = min(stable, whole_units(new_steps - cooldown_steps))
    return Extension(
        resume_step=resume,
        num_steps=new_steps - resume,
        lr_factor=1.0,
        ramp_steps=0,
        shape=wsd(cooldown=min(1.0, cooldown_steps / (new_steps - resume)), decay=decay),
        cooldown=share,
        best_base_lr_ratio=terms(share).best_base_lr / goal,
        terms=terms(share),
    )


def _validated(
    factors: ArrayLike, norms: ArrayLike, distance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factors up to the last positive one, and the squared norms that go with them."""
    eta = np.asarray(factors, dtype=np.float64)
    sizes = np.asarray(norms, dtype=np.float64)
    if eta.ndim != 1 or not np.all(np.isfinite(eta) & (eta >= 0)):
        raise ValueError("factors must be a flat array of finite numbers that are not negative")
    if not np.any(eta):
        raise ValueError(f"a schedule needs a positive factor, got {eta.size} factors that are all zero")
    if sizes.shape not in ((), eta.shape):
        raise ValueError(
            f"norms must be a number or as many as the {eta.size} factors, got shape {sizes.shape}: "
            "stretch(norms, len(factors)) resamples them"
        )
    if not np.all(np.isfinite(sizes) & (sizes >= 0)):
        raise ValueError("norms must be finite and not negative: leave out the steps that were skipped")
    require(0 < distance < math.inf, "distance must be positive and finite", distance)
    # the sum of the factors from a trailing zero on is zero, and the bound divides by it
    length = int(np.flatnonzero(eta)[-1]) + 1
    return eta[:length], np.square(np.broadcast_to(sizes, eta.shape)[:length])


def _terms(distance: float, gradient: float) -> BoundTerms:
    if not 0 < gradient < math.inf:
        raise ValueError(
            f"the gradient term of the bound is {gradient}: the norms must be positive at some step with a "
            "positive factor, and their squares within the range of float64"
        )
    # Apart, not as their sum: the best base learning rate, and the bound at any other, follow without another pass.
    return BoundTerms(distance=float(distance), gradient=gradient)


def _last_full_step(num_steps: int, cooldown: float, warmup_steps: int, new_steps: int) -> int:
    """Steps of the finished run before its cooldown."""
    require(0 < cooldown < 1, "the cooldown of a run to extend must lie in (0, 1)", cooldown)
    if not 0 <= warmup_steps < num_steps < new_steps:
        raise ValueError(
            "an extension needs 0 <= warmup_steps < num_steps < new_steps (of its new total), "
            f"got {warmup_steps}, {num_steps} and {new_steps}"
        )
    require(new_steps <= MOST_STEPS, f"new_steps must be at most {MOST_STEPS}", new_steps)
    return whole_units(num_steps - cooldown * (num_steps - warmup_steps))


def whole_units(count: float) -> int:
    """Whole units in ``count``, allowing for a rounding error below a whole number."""
    return math.floor(count + 1e-6)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of a function that changes sign between low and high, by the Illinois form of false position."""
    # Each evaluation is O(T), so their number matters: about ten, where bisection takes forty.
    at_low, at_high = function(low), function(high)
    for _ in range(100):
        middle = high - at_high * (high - low) / (at_high - at_low)
        at_middle = function(middle)
        if abs(at_middle) < 1e-12:
            return middle
        if (at_middle > 0) != (at_high > 0):
            low, at_low = high, at_high
        else:
            # The Illinois step: plain false position keeps one end fixed on a convex function, and converges slowly.
            at_low /= 2
        high, at_high = middle, at_middle
    raise AssertionError(f"no root found between {low} and {high}")
