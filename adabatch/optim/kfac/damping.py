"""How much is added to the factors before they are inverted.

K-FAC damps the input factor A and the output factor B of a layer by two numbers, whose form decides whether what was
tuned on a narrow model holds on a wide one (Ishikawa and Karakida 2024). A form maps a pair of factors and the user's
one number to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

DampingName = Literal["trace", "absolute", "kronecker", "split"]
"""The forms that have a name; "kronecker" damps the product of both factors and is no pair of numbers."""


class Factor(NamedTuple):
    """One side's factor, the mean of ``x x^T`` over rows ``x``.

    Args:
        values: the factor, shape (d, d), or its diagonal, shape (d,), or, ``in_rows``, rows whose ``x x^T`` sum to it,
            shape (num_rows, d).
        trace: its trace.
        in_rows: which of them.
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
        input: A; the number 1 for a bias.
        output: B.
    """

    input: Factor
    output: Factor


class Damping(NamedTuple):
    """What is added to the diagonals of A and of B."""

    input: float
    output: float


DampingForm = Callable[[FactorPair, Mapping[str, Any]], Damping]
"""Of a pair of factors and the parameter group, whose ``damping`` it reads."""


def trace(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """``damping`` times the trace of each factor: valid in every layer at every width (Ishikawa and Karakida 2024)."""
    return Damping(group["damping"] * pair.input.trace, group["damping"] * pair.output.trace)


def absolute(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """``damping`` itself at the base width; times the fan-in ratio for A, over the fan-out ratio for B."""
    fan_in, fan_out = width_ratios(group)
    return Damping(group["damping"] * fan_in, group["damping"] / fan_out)


def kronecker(group: Mapping[str, Any]) -> float:
    """What is added to each eigenvalue of ``A (x) B``: ``damping`` times fan-in ratio over fan-out ratio."""
    fan_in, fan_out = width_ratios(group)
    return float(group["damping"] * fan_in / fan_out)


def width_ratios(group: Mapping[str, Any]) -> tuple[float, float]:
    """d_in and d_out over those of the base model, where a width plan made the group; else 1."""
    return group.get("fan_in_ratio", 1.0), group.get("fan_out_ratio", 1.0)


def split(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """``sqrt(damping)`` split by pi, the root of the ratio of mean eigenvalues (Martens and Grosse 2015, section 6.3).

    The textbook form, for comparison only: it freezes the input layer as the width grows.
    """
    pi = math.sqrt((pair.input.trace / pair.input.dim) / (pair.output.trace / pair.output.dim))
    return Damping(math.sqrt(group["damping"]) * pi, math.sqrt(group["damping"]) / pi)


_FORMS: dict[str, DampingForm] = {"trace": trace, "absolute": absolute, "split": split}


def form_of(form: DampingName | DampingForm) -> DampingForm | None:
    """The form of that name; None for "kronecker".

    Raises:
        ValueError: an unknown name.
    """
    if callable(form):
        return form
    if form not in get_args(DampingName):
        raise ValueError(f"damping_form must be one of {', '.join(get_args(DampingName))} or a function, got {form!r}")
    return _FORMS.get(form)
