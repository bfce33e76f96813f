"""A user's own learning-rate shape: a function from progress to factor, identified by its name and its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from adabatch.arguments import checked_but, shown
from adabatch.lr.shapes import FloatArray, Shape

# One more than a power of two, so that the points are exact in binary, and the same on every machine.
NUM_POINTS = 257
"""Values by which a function is checked and recognized: at progress 0, 1/256, ..., 1."""

TOLERANCE = 1e-9
"""Relative difference that counts as rounding: the sine of another machine may differ in its last digits."""

SAVED_AS = "function"


class FunctionShape:
    """A function of progress instead of a ``Shape``: ``factor = function(progress)``, with progress in [0, 1].

    ``ProgressLR`` makes one from any function that it gets, so this class is needed only to give the function a name,
    or for ``lr.discretize`` and ``lr.transfer``, which evaluate a shape at several progresses at once.

    A function cannot be saved as data. Its name and its values at 257 progresses are saved instead, and a resumed run
    must be built with a function that has the same values (to a relative 1e-9); its name may differ. A difference only
    between those points is not noticed.

    Args:
        function: progress -> factor on the base learning rate: finite, not negative, the same at each call. It is
            called with one number at a time, always in [0, 1].
        name: its name in errors; by default the name of the function.

    Raises:
        TypeError: if it cannot be called with one number, or does not return a number.
        ValueError: if a value is negative or not finite at any of the 257 progresses, all values are zero, or two calls
            with the same progress give different values.
    """

    @checked_but("function")
    def __init__(self, function: Callable[[float], float], *, name: str | None = None) -> None:
        if not callable(function):
            raise TypeError(f"a shape must be a function of progress, got {shown(function)}")
        self._function = function
        self._name = name if name is not None else getattr(function, "__qualname__", type(function).__qualname__)
        self._values = self._at_the_points()
        if not any(self._values):
            raise ValueError(f"{self}: all of its values are zero, and nothing would train")
        # A second time: a function that counts its calls, or draws numbers, would give a resumed run another schedule.
        if (first := _first_difference(self._values, self._at_the_points())) is not None:
            raise ValueError(
                f"{self} gave two values at progress {first / (NUM_POINTS - 1)}: a shape must be a function of "
                f"progress alone, without memory or chance"
            )

    @property
    def name(self) -> str:
        """Its name in errors."""
        return self._name

    @overload
    def __call__(self, progress: float) -> float: ...
    @overload
    def __call__(self, progress: NDArray[Any] | Sequence[float]) -> FloatArray: ...
    def __call__(self, progress: float | NDArray[Any] | Sequence[float]) -> float | FloatArray:
        """The factor at ``progress``, a number or an array; clamped to [0, 1].

        Raises:
            ValueError: if a progress is NaN, or a value is negative or not finite.
        """
        if np.isscalar(progress):
            return self._one(float(progress))  # type: ignore[arg-type]
        numbers = np.asarray(progress, dtype=np.float64)
        # one at a time, since users write math.cos, which takes no array
        return np.array([self._one(each) for each in numbers.ravel().tolist()], dtype=np.float64).reshape(numbers.shape)

    def to_dict(self) -> dict[str, Any]:
        """``{"name": "function", "settings": {"name": ..., "values": [...]}}``, as in a checkpoint."""
        # a checkpoint holds no code, so values stand for the function, and tell another one apart at a resume
        return {"name": SAVED_AS, "settings": {"name": self._name, "values": list(self._values)}}

    def difference(self, saved: Mapping[str, Any]) -> str:
        """How a saved shape differs from this one, in words; empty for the same shape."""
        if saved["name"] != SAVED_AS:
            return f"the shape {Shape.from_dict(saved)}, this run has {self}"
        theirs = saved["settings"]["values"]
        index = _first_difference(theirs, self._values)
        if index is None:
            return ""
        return (
            f"the function {saved['settings']['name']}, which is {theirs[index]:.6g} at progress "
            f"{index / (NUM_POINTS - 1):.4g}, this run has {self}, which is {self._values[index]:.6g} there"
        )

    def __repr__(self) -> str:
        return f"FunctionShape({self._name})"

    def _one(self, progress: float) -> float:
        if math.isnan(progress):
            raise ValueError("progress must be a number, got NaN: a total of zero or a missing count gives this")
        at = min(1.0, max(0.0, progress))
        found = self._function(at)
        try:
            factor = float(found)
        except (TypeError, ValueError):
            raise TypeError(f"{self} must return a number, got {found!r} at progress {at}") from None
        if not 0 <= factor < math.inf:
            raise ValueError(f"{self} must be finite and not negative, got {factor} at progress {at}")
        return factor

    def _at_the_points(self) -> tuple[float, ...]:
        return tuple(self._one(index / (NUM_POINTS - 1)) for index in range(NUM_POINTS))


AnyShape: TypeAlias = Shape | FunctionShape
"""A shape of this library, or a user's own."""


def shape_from(shape: AnyShape | Callable[[float], float]) -> AnyShape:
    """The shape for a user's argument: a shape of this library, or a function of progress.

    Raises:
        TypeError: if it is neither, such as a name, or a function of ``adabatch.lr`` that was not called.
        ValueError: see ``FunctionShape``.
    """
    if isinstance(shape, Shape | FunctionShape):
        return shape
    expected = "shape must come from adabatch.lr, such as adabatch.lr.cosine(), or be a function progress -> factor"
    # lr.cosine without its parentheses can be called too, and would fail later with a worse message
    if not callable(shape) or getattr(shape, "__module__", None) == Shape.__module__:
        raise TypeError(f"{expected}, got {shown(shape)}")
    return FunctionShape(shape)


def check_same_shape(shape: AnyShape, saved: Mapping[str, Any]) -> None:
    """Raises a ValueError that names both if a saved shape (its ``to_dict()``) differs from ``shape``."""
    if isinstance(shape, FunctionShape):
        found = shape.difference(saved)
    elif saved["name"] == SAVED_AS:
        found = f"the function {saved['settings']['name']}, this run has {shape}"
    else:
        theirs = Shape.from_dict(saved)
        found = "" if theirs == shape else f"the shape {theirs}, this run has {shape}"
    if found:
        raise ValueError(f"the schedule was saved with {found}: use one of them")


def _first_difference(one: Sequence[float], other: Sequence[float]) -> int | None:
    """The index at which two lists of values first differ by more than rounding; None if they do not."""
    pairs = enumerate(zip(one, other, strict=True))
    # abs_tol, because near a zero of the function rounding is no longer small relative to the value: cos(pi / 2)
    return next((k for k, (a, b) in pairs if not math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-15)), None)
