"""How much is added to the factors before they are inverted.

K-FAC damps the input factor A and the output factor B of a layer by two numbers. How these depend on the factors
decides whether a damping that was tuned on a narrow model is right for a wide one (Ishikawa and Karakida 2024). A form
computes both from a pair of factors and the user's one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

DampingName = Literal["trace", "absolute", "kronecker", "split"]
"""The forms that have a name. "kronecker" damps the product of both factors, so it is not a pair of numbers."""


class Factor(NamedTuple):
    """One side's factor, the mean of ``x x^T`` over rows ``x``.

    Args:
        values: the factor, shape (d, d); or its diagonal, shape (d,); or with ``in_rows``, rows whose ``x x^T`` sum to
            the factor, shape (num_rows, d).
        trace: its trace.
        in_rows: whether ``values`` are rows.
    """

    values: Tensor
    trace: float
    in_rows: bool = False

    @property
    def dim(self) -> int:
        """d."""
        return self.values.shape[-1]


class FactorPair(NamedTuple):
    """The two factors of a parameter.

    Args:
        input: A; for a bias the number 1.
        output: B.
    """

    input: Factor
    output: Factor


class Damping(NamedTuple):
    """The numbers that are added to the diagonals of A and B."""

    input: float
    output: float


DampingForm = Callable[[FactorPair, Mapping[str, Any]], Damping]
"""A pair of factors and the parameter group, whose ``damping`` it reads -> the damping of both factors."""


def trace(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """``damping`` times the trace of each factor, which suits every layer at every width (Ishikawa and Karakida
    2024)."""
    return Damping(group["damping"] * pair.input.trace, group["damping"] * pair.output.trace)


def absolute(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """``damping`` times the fan-in ratio for A, and ``damping`` over the fan-out ratio for B."""
    fan_in, fan_out = width_ratios(group)
    return Damping(group["damping"] * fan_in, group["damping"] / fan_out)


def kronecker(group: Mapping[str, Any]) -> float:
    """The number added to each eigenvalue of ``A (x) B``: ``damping`` times fan-in ratio over fan-out ratio."""
    fan_in, fan_out = width_ratios(group)
    return float(group["damping"] * fan_in / fan_out)


def width_ratios(group: Mapping[str, Any]) -> tuple[float, float]:
    """d_in and d_out relative to the base model if a width plan made the group; else 1."""
    return group.get("fan_in_ratio", 1.0), group.get("fan_out_ratio", 1.0)


def split(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """``sqrt(damping)`` split by pi, the root of the ratio of mean eigenvalues (Martens and Grosse 2015, section 6.3).

    This is the textbook form, for comparison only: as the width grows, it stops the input layer from learning.
    """
    pi = math.sqrt((pair.input.trace / pair.input.dim) / (pair.output.trace / pair.output.dim))
    return Damping(math.sqrt(group["damping"]) * pi, math.sqrt(group["damping"]) / pi)


_FORMS: dict[str, DampingForm] = {"trace": trace, "absolute": absolute, "split": split}


def form_of(form: DampingName | DampingForm) -> DampingForm | None:
    """The form with this name; None for "kronecker".

    Raises:
        ValueError: if the name is unknown.
    """
    if callable(form):
        return form
    if form not in get_args(DampingName):
        raise ValueError(f"damping_form must be one of {', '.join(get_args(DampingName))} or a function, got {form!r}")
    return _FORMS.get(form)
