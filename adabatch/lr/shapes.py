"""Shapes: pure functions from a run's progress in [0, 1] to the factor on the base learning rate.

A shape is data: a name and its settings. It can be compared, stored as JSON, pickled, printed and called:

    >>> wsd(cooldown=0.5)(0.75)
    0.5
    >>> Shape.from_dict(cosine(floor=0.1).to_dict()) == cosine(floor=0.1)
    True

**Progress** is clamped to [0, 1], because the last batch of a run may overshoot. The clock, not the shape, determines
what it counts (examples, tokens, steps, gain-steps). Every shape is 1 at progress 0, except ``tabulated``, which begins
at the first value of its table. A ``floor`` is a ratio of the base learning rate: for an end at the learning rate ``r``
use ``floor=r / base_lr``, and build the shape again if the base learning rate changes.

**Warm-up is not in a shape**, because its length is best counted in another unit than the rest (the
optimizer's own averages warm up in steps, while the length of a run is in examples). The scheduler adds it:

    factor = warmup_factor(consumed / warmup, start) * shape(0)                       while consumed < warmup
    factor = shape((consumed - warmup) / (total - warmup))                            after it

so that progress runs over the rest after the warm-up, and the factor is continuous.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adabatch.arguments import allowed_by, checked, conform, require, require_one_of, require_type, shown

Decay = Literal["linear", "1-sqrt", "exponential", "cosine"]
ShapeSetting: TypeAlias = float | str | tuple[float, ...]
FloatArray: TypeAlias = NDArray[np.float64]
Curve: TypeAlias = Callable[[FloatArray], FloatArray]


class Shape:
    """A learning-rate schedule without its learning rate: ``factor = shape(progress)``. Immutable.

    The functions of this module make shapes; ``Shape(name, settings)`` calls the one of that name.

    Args:
        name: name of a function of this module, such as ``"wsd"``.
        settings: its arguments; those with a default may be left out.

    Raises:
        ValueError: if the name is unknown, or a setting is unknown, missing or out of its range.
    """

    __slots__ = ("_curve", "_name", "_settings")

    _name: str
    _settings: Mapping[str, ShapeSetting]
    _curve: Curve

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        if not isinstance(name, str) or name not in FACTORIES:
            raise ValueError(f"there is no shape {shown(name)}: use one of {', '.join(FACTORIES)}, by its name")
        factory = FACTORIES[name]
        require_type(isinstance(settings, Mapping), "settings must be a mapping", settings)
        parameters = inspect.signature(factory).parameters
        unknown = set(settings) - set(parameters)
        if unknown:
            names = ", ".join(map(repr, sorted(map(str, unknown))))
            raise ValueError(f"{name} has no setting {names}: its settings are {', '.join(parameters) or 'none'}")
        missing = [key for key, value in parameters.items() if value.default is value.empty and key not in settings]
        if missing:
            raise ValueError(f"{name} needs the setting {', '.join(map(repr, missing))} in its settings")
        # through the function, so that a shape from a config or a checkpoint passes the same checks as one from code
        made = factory(**settings)
        self._fill(made._name, made._settings, made._curve)

    def __init_subclass__(cls) -> None:
        # not typing.final: command-line parsers would then reject functions that return a Shape
        raise TypeError("Shape is final: add a function to this module that makes a new one")

    def _fill(self, name: str, settings: Mapping[str, ShapeSetting], curve: Curve) -> None:
        # the class itself refuses assignments
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_settings", MappingProxyType(dict(settings)))
        object.__setattr__(self, "_curve", curve)

    @property
    def name(self) -> str:
        """The name of the function that made this shape."""
        return self._name

    @property
    def settings(self) -> Mapping[str, ShapeSetting]:
        """Every argument of that function, defaults included; read-only. Sequences are tuples."""
        return self._settings

    @overload
    def __call__(self, progress: float) -> float: ...
    @overload
    def __call__(self, progress: NDArray[Any] | Sequence[float]) -> FloatArray: ...
    def __call__(self, progress: float | NDArray[Any] | Sequence[float]) -> float | FloatArray:
        """The factor at ``progress``, a number or an array of any dimensions; clamped to [0, 1].

        Raises:
            ValueError: if a progress is NaN.
        """
        numbers = _clamped("progress", progress)
        # A number is evaluated as an array of one. numpy computes the power or sine of a scalar with another library
        # than that of an array, whose vectorized loops depend on the processor; they differ in the last digit.
        factors = np.asarray(self._curve(numbers.ravel())).reshape(numbers.shape)
        return float(factors) if np.isscalar(progress) else factors

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., "settings": {...}}`` of strings, numbers and lists: what JSON can hold."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in self._settings.items()}
        return {"name": self._name, "settings": settings}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Shape:
        """The shape that ``to_dict`` described.

        Raises:
            ValueError: if there are other keys than ``name`` and ``settings``, and for the reasons of ``Shape``.
        """
        if set(state) != {"name", "settings"}:
            raise ValueError(f"a shape is described by the keys 'name' and 'settings', got {sorted(map(str, state))}")
        return cls(state["name"], state["settings"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Shape):
            return NotImplemented
        return self._name == other._name and self._settings == other._settings

    def __hash__(self) -> int:
        return hash((self._name, tuple(self._settings.items())))

    def __repr__(self) -> str:
        defaults = {k: v.default for k, v in inspect.signature(FACTORIES[self._name]).parameters.items()}
        given = [f"{k}={_brief(v)}" for k, v in self._settings.items() if v != defaults[k]]
        return f"{self._name}({', '.join(given)})"

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Shape], tuple[dict[str, Any]]]:
        # the curve is a closure, which cannot be pickled
        return Shape.from_dict, (self.to_dict(),)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a shape is immutable: make a new one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a shape is immutable: {name!r} cannot be deleted")


def constant() -> Shape:
    """The base learning rate throughout: ``1``."""
    return _shape("constant", {}, np.ones_like)


@checked
def linear(*, floor: float = 0.0) -> Shape:
    """Linear decay: ``floor + (1 - floor) * (1 - p)``.

    The worst-case optimum for the last iterate of SGD on convex functions (Defazio et al. 2023,
    arXiv:2310.07831, Algorithm 1 with constant gradient norms).

    Args:
        floor: last value, a ratio of the base learning rate in [0, 1].
    """
    low = _share("floor", floor)
    return _shape("linear", {"floor": low}, lambda p: low + (1 - low) * (1 - p))


@checked
def cosine(*, floor: float = 0.0) -> Shape:
    """Half a cosine: ``floor + (1 - floor) * (1 + cos(pi p)) / 2``.

    The schedule of Loshchilov and Hutter (2017, arXiv:1608.03983) without its restarts.

    Args:
        floor: last value, a ratio of the base learning rate in [0, 1].
    """
    low = _share("floor", floor)
    # equal to the cosine form, but without its cancellation near p = 1: sin^2(pi (1 - p) / 2)
    return _shape("cosine", {"floor": low}, lambda p: low + (1 - low) * np.sin(np.pi / 2 * (1 - p)) ** 2)


@checked
def wsd(*, cooldown: float, decay: Decay = "linear", floor: float = 0.0) -> Shape:
    """Warm-up, stable, decay, without the warm-up: 1 until ``p = 1 - cooldown``, then down to ``floor``.

    With ``q`` in [0, 1] the share of the cooldown that is over, it is ``floor + (1 - floor) * d(q)``, where d
    is

        linear        1 - q
        1-sqrt        1 - sqrt(q)
        exponential   2 * 0.5^q - 1        (the form of Megatron-LM, which ends on zero)
        cosine        (1 + cos(pi q)) / 2

    Sources: Hu et al. 2024, arXiv:2404.06395 (wsd); Haegele et al. 2024, arXiv:2405.18392 (1-sqrt).

    Args:
        cooldown: length of the cooldown as a share of the progress, in [0, 1]; with 0 there is no decay, with 1
            no stable part.
        decay: form of the cooldown.
        floor: last value, a ratio of the base learning rate in [0, 1].
    """
    length = _share("cooldown", cooldown)
    low = _share("floor", floor)
    require_one_of("decay", decay, Decay)

    def curve(p: FloatArray) -> FloatArray:
        return low + (1 - low) * _DECAYS[decay](_left(p, length))

    return _shape("wsd", {"cooldown": length, "decay": decay, "floor": low}, curve)


@checked
def inverse_sqrt(*, timescale: float, cooldown: float = 0.0, floor: float = 0.0) -> Shape:
    """Inverse square root: ``max(floor, sqrt(s / (s + p)))``, with a linear cooldown to ``floor`` at the end.

    The usual forms count steps. ``timescale = n / R``, with ``R`` the length of the run after its warm-up, is
    ``sqrt(n / (n + t))`` at ``t`` steps after the warm-up: ``n`` is the length of the warm-up if the schedule
    is written ``sqrt(warmup / step)``, and 1 if it is ``1 / sqrt(step)`` with steps from one.

    Args:
        timescale: ``s``, positive: the progress at which the factor has fallen to ``1 / sqrt(2)``.
        cooldown: length of the cooldown as a share of the progress, in [0, 1]; 0 for no cooldown. It starts from
            the value of the curve at that point.
        floor: smallest and last value, a ratio of the base learning rate in [0, 1]. Without a cooldown the last
            value is larger if ``sqrt(s / (s + 1))`` is.
    """
    scale = _positive("timescale", timescale)
    length = _share("cooldown", cooldown)
    low = _share("floor", floor)

    def curve(p: FloatArray) -> FloatArray:
        # the curve stands still during the cooldown, which falls from its value there
        before = np.maximum(low, np.sqrt(scale / (scale + np.minimum(p, 1 - length))))
        return low + (before - low) * _left(p, length)

    return _shape("inverse_sqrt", {"timescale": scale, "cooldown": length, "floor": low}, curve)


@checked
def polynomial(*, power: float, floor: float = 0.0) -> Shape:
    """Polynomial decay: ``floor + (1 - floor) * (1 - p)^power``.

    Args:
        power: positive; 1 is linear decay, 2 falls faster at first, 0.5 later.
        floor: last value, a ratio of the base learning rate in [0, 1].
    """
    exponent = _positive("power", power)
    low = _share("floor", floor)
    return _shape("polynomial", {"power": exponent, "floor": low}, lambda p: low + (1 - low) * (1 - p) ** exponent)


@checked
def piecewise(*, milestones: Sequence[float], factors: Sequence[float]) -> Shape:
    """Steps: the product of the factors whose milestone is reached, those with ``p >= milestones[i]``.

    A batch that jumps over several milestones passes them all.

    Args:
        milestones: progress from which each factor applies, strictly increasing in (0, 1].
        factors: positive factors on the value before each milestone; as many as milestones.
    """
    at = _numbers("milestones", milestones)
    by = _numbers("factors", factors)
    if len(at) != len(by):
        raise ValueError(f"piecewise needs one factor per milestone, got {len(at)} milestones and {len(by)} factors")
    if any(np.diff((0.0, *at)) <= 0) or max(at, default=0.0) > 1:
        raise ValueError(f"milestones must increase strictly within (0, 1], got {list(at)}")
    require(all(factor > 0 for factor in by), "factors must be positive", list(by))
    levels = np.cumprod((1.0, *by))
    edges = np.array(at, dtype=np.float64)

    def curve(p: FloatArray) -> FloatArray:
        # right: a milestone counts from its own progress on
        return np.asarray(levels[np.searchsorted(edges, p, side="right")])

    return _shape("piecewise", {"milestones": at, "factors": by}, curve)


@checked
def hyperbolic(*, upper_bound: float, infimum: float, max_iter: float = 1.0) -> Shape:
    """HyperbolicLR (Kim 2024, arXiv:2407.15200): ``1 + (1 - infimum) * (h(p) - h(0))``.

    With ``u = upper_bound / max_iter`` and the paper's ``x = p * max_iter``,

        h(p) = sqrt((1 - p) / u * (2 - (1 + p) / u)) = sqrt((1 - x / U)^2 - (1 - N / U)^2)

    It ends at ``1 - (1 - infimum) * h(0)``, which is ``infimum`` only if ``u`` is 1 (then the shape is linear),
    and far above it if ``u`` is large: near ``1 - sqrt(2 / u)``.

    Args:
        upper_bound: the paper's U, at least ``max_iter``.
        infimum: the paper's infimum learning rate as a ratio of the base learning rate, in [0, 1).
        max_iter: the paper's N, in the unit of ``upper_bound`` and without the warm-up; 1 if ``upper_bound`` is
            already the ratio U / N. Only the ratio is kept in the settings.
    """
    ratio = _upper_bound(upper_bound, max_iter)
    low = _number("infimum", infimum)
    if not 0 <= low < 1:
        raise ValueError(_BAD_INFIMUM.format(range="[0, 1)", value=low))
    end = 1 - (1 - low) * _height(0.0, ratio)
    return _shape("hyperbolic", {"upper_bound": ratio, "infimum": low}, lambda p: end + (1 - low) * _height(p, ratio))


@checked
def exp_hyperbolic(*, upper_bound: float, infimum: float, max_iter: float = 1.0) -> Shape:
    """ExpHyperbolicLR (Kim 2024, arXiv:2407.15200): ``infimum^(h(0) - h(p))``.

    The h is that of ``hyperbolic``. It ends at ``infimum^h(0)``, which is ``infimum`` only if U = N (then the
    shape is exponential).

    Args:
        upper_bound: the paper's U, at least ``max_iter``.
        infimum: the paper's infimum learning rate as a ratio of the base learning rate, in (0, 1).
        max_iter: the paper's N, as for ``hyperbolic``.
    """
    ratio = _upper_bound(upper_bound, max_iter)
    low = _number("infimum", infimum)
    if not 0 < low < 1:
        raise ValueError(_BAD_INFIMUM.format(range="(0, 1)", value=low))
    return _shape(
        "exp_hyperbolic",
        {"upper_bound": ratio, "infimum": low},
        lambda p: low ** (_height(0.0, ratio) - _height(p, ratio)),
    )


@checked
def adjusted_infimum(
    infimum: float, last: float, *, upper_bound: float, max_iter: float = 1.0, weight: float = 0.5
) -> float:
    """A new infimum from the wanted end of a run with ``exp_hyperbolic``: the paper's ``adjust_infimum``.

    In logarithms, the mean of the old infimum, with weight ``1 - weight``, and the value at ``upper_bound`` of a
    straight line from the base learning rate through ``last`` at ``max_iter``.

    Args:
        infimum: the present one, as for ``exp_hyperbolic``.
        last: wanted last factor, in (0, 1), a ratio of the base learning rate.
        upper_bound, max_iter: as for ``hyperbolic``.
        weight: of the line, in [0, 1]: m / (m + n) in the published code.

    Raises:
        ValueError: if a number is out of its range.

    Source: the official code of Kim 2024, arXiv:2407.15200.
    """
    ratio = _upper_bound(upper_bound, max_iter)
    share = _share("weight", weight)
    low, end = _number("infimum", infimum), _number("last", last)
    if not 0 < low < 1:
        raise ValueError(_BAD_INFIMUM.format(range="(0, 1)", value=low))
    require(0 < end < 1, "last must lie in (0, 1), a ratio of the base learning rate", end)
    # at upper_bound, which lies `ratio` times as far as max_iter, the line has fallen `ratio` times as far
    return float(low ** (1 - share) * end ** (ratio * share))


@checked
def tabulated(*, values: Sequence[float]) -> Shape:
    """A table, such as a refined schedule: linear interpolation of ``values`` at ``p * (len(values) - 1)``.

    The first value is the one at progress 0 and need not be 1; the last is the one at progress 1, exactly as
    given.

    Args:
        values: factors, not negative, at least two and one of them positive, at equal distances of progress.
    """
    table = _numbers("values", values)
    if len(table) < 2:
        raise ValueError(f"a table needs at least 2 values, got {len(table)}: use constant() for a single one")
    heights, last = np.array(table), len(table) - 1
    if heights.min() < 0 or heights.max() <= 0:
        raise ValueError(f"the values of a table must not be negative, nor all zero, got {min(table)} to {max(table)}")
    index = np.arange(len(table), dtype=np.float64)
    # progress in entries, and not entries in progress: at 1 it is the last entry without rounding
    return _shape("tabulated", {"values": table}, lambda p: np.interp(p * last, index, heights))


@overload
def warmup_factor(fraction: float, start: float = 0.0) -> float: ...
@overload
def warmup_factor(fraction: NDArray[Any] | Sequence[float], start: float = 0.0) -> FloatArray: ...
def warmup_factor(fraction: float | NDArray[Any] | Sequence[float], start: float = 0.0) -> float | FloatArray:
    """Linear warm-up: ``start + (1 - start) * fraction``; 1 at its end and afterwards.

    The head of this module describes how it is combined with a shape.

    Args:
        fraction: share of the warm-up that is over, a number or an array; clamped to [0, 1]. Do not call this
            for a warm-up of length zero.
        start: first factor, a ratio of the base learning rate, not negative. For a learning rate ``r`` use
            ``r / base_lr``. A start above 1 gives a smooth transition to a lower base learning rate.

    Raises:
        ValueError: if a fraction is NaN, or the start is out of its range.
    """
    low = _number("start", start)
    require(0 <= low < math.inf, "start must be finite and not negative", low)
    share = _clamped("fraction", fraction)
    factors = low + (1 - low) * share
    return float(factors) if np.isscalar(fraction) else factors


def _shape(name: str, settings: Mapping[str, ShapeSetting], curve: Curve) -> Shape:
    """A shape from parts that are already validated, without its constructor."""
    shape = object.__new__(Shape)
    shape._fill(name, settings, curve)
    return shape


def _left(p: FloatArray, cooldown: float) -> FloatArray:
    """The remaining share of the cooldown: 1 before it, 0 at the end."""
    if cooldown == 0:
        return np.ones_like(p)
    # At the beginning of the cooldown, 1 - p differs from its length by the rounding of p. This matters only under a
    # square root, which turns one unit in the last place into 1.5e-8. The second term is for cooldowns as short as
    # that rounding.
    rounding = min(2**-52, cooldown / 1024)
    left = 1 - p
    return np.where(left >= cooldown - rounding, 1.0, np.minimum(left, cooldown) / cooldown)


# the remaining decay as a function of the remaining share r = 1 - q; each form is accurate for r -> 0
_DECAYS: Mapping[str, Curve] = MappingProxyType(
    {
        "linear": lambda r: r,
        "1-sqrt": lambda r: r / (1 + np.sqrt(1 - r)),
        "exponential": lambda r: np.expm1(np.log(2) * r),
        "cosine": lambda r: np.sin(np.pi / 2 * r) ** 2,
    }
)


def _height(p: FloatArray | float, ratio: float) -> FloatArray:
    """The hyperbola's h in terms of what is left, ``r = 1 - p``: ``sqrt(r (r + 2 (u - 1))) / u``."""
    # The paper's difference of squares can become negative near p = 1, and its factored form still loses digits there.
    left = 1 - np.asarray(p, dtype=np.float64)
    return np.asarray(np.sqrt(left * (left + 2 * (ratio - 1))) / ratio)


_BAD_INFIMUM = (
    "infimum must lie in {range}, got {value}: it is the ratio infimum_lr / base_lr, "
    "and every group's base learning rate must be above the infimum learning rate"
)


def _upper_bound(upper_bound: float, max_iter: float) -> float:
    # only the quotient: in progress, which ends at 1, the paper's two counts of steps have no meaning of their own
    ratio = _positive("upper_bound", upper_bound) / _positive("max_iter", max_iter)
    if not 1 <= ratio < math.inf:
        raise ValueError(f"upper_bound must be at least max_iter, got {upper_bound} and {max_iter}")
    return ratio


def _clamped(name: str, value: float | NDArray[Any] | Sequence[float]) -> FloatArray:
    # What the scheduler passes at every step needs no conversion.
    plain = isinstance(value, float) or (isinstance(value, np.ndarray) and value.dtype == np.float64)
    numbers = np.asarray(value if plain else conform(name, value, allowed_by(ArrayLike)), dtype=np.float64)
    if np.isnan(numbers).any():
        raise ValueError(f"{name} must be a number, got NaN: a total of zero or a missing count gives this")
    return np.clip(numbers, 0.0, 1.0)


def _number(name: str, value: object) -> float:
    return float(conform(name, value, allowed_by(float)))


def _share(name: str, value: object) -> float:
    number = _number(name, value)
    require(0 <= number <= 1, f"{name} must lie in [0, 1]", number)
    return number


def _positive(name: str, value: object) -> float:
    number = _number(name, value)
    require(0 < number < math.inf, f"{name} must be positive and finite", number)
    return number


def _numbers(name: str, values: object) -> tuple[float, ...]:
    array = conform(name, values, allowed_by(ArrayLike))
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a flat sequence of finite numbers, got {_brief(values)}")
    return tuple(array.tolist())


def _brief(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"<{len(value)} numbers, {value[0]:.4g} to {value[-1]:.4g}>"
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


# By the functions' own names, which configs and checkpoints hold: one that is renamed must stay readable here.
FACTORIES: Mapping[str, Callable[..., Shape]] = MappingProxyType(
    {
        factory.__name__: factory
        for factory in (
            constant,
            linear,
            cosine,
            wsd,
            inverse_sqrt,
            polynomial,
            piecewise,
            hyperbolic,
            exp_hyperbolic,
            tabulated,
        )
    }
)
"""The functions that make shapes, by name."""
