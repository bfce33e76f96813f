"""One parameter in a plan: its shape, that in the base model, which dimensions are fans, and its role."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from adabatch.arguments import check_fields, require

Dim = Literal["in", "out", "kernel", "stack"]
"""What a dimension of a parameter is. "in": the layer sums over it. "out": one number per output. "kernel": a position
in a kernel, which the layer sums over too, but which is never width. "stack": one of several matrices, part of neither
fan."""

ParameterKind = Literal["weight", "conv", "embedding", "bias", "norm", "other"]
"""What a parameter does; "other" if its module is unknown."""

Role = Literal["input", "hidden", "output", "fixed", "vector"]
"""Which fans of a parameter grow with width: out, both, in, or neither, respectively; "vector" for parameters without a
fan-in, such as biases and gains."""

# The dimensions that are not width, by role; kernels and stacks never are.
_FIXED: Mapping[Role, frozenset[Dim]] = MappingProxyType(
    {
        "input": frozenset({"in"}),
        "hidden": frozenset(),
        "output": frozenset({"out"}),
        "fixed": frozenset({"in", "out"}),
        "vector": frozenset({"in"}),
    }
)


@dataclass(frozen=True)
class Entry:
    """One parameter of a plan; all that a width rule reads.

    Args:
        shape: its shape in the model.
        base_shape: its shape in the base model, except that dimensions which are not width according to the role are
            those of the model.
        layout: what each dimension is.
        kind: what the parameter does.
        role: which fans grow with width.
        tied: further names of the same parameter.
    """

    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    layout: tuple[Dim, ...]
    kind: ParameterKind
    role: Role
    tied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("shape", "base_shape"):
            require(all(size >= 0 for size in getattr(self, name)), f"{name} must not be negative", getattr(self, name))

    @property
    def fan_in(self) -> int:
        """Number of inputs of one output."""
        return _product(self.shape, self.layout, "in", "kernel")

    @property
    def fan_out(self) -> int:
        """Number of outputs."""
        return _product(self.shape, self.layout, "out")

    @property
    def base_fan_in(self) -> int:
        """``fan_in`` in the base model."""
        return _product(self.base_shape, self.layout, "in", "kernel")

    @property
    def base_fan_out(self) -> int:
        """``fan_out`` in the base model."""
        return _product(self.base_shape, self.layout, "out")

    @property
    def r_in(self) -> float:
        """Fan-in over that of the base model."""
        return self.fan_in / self.base_fan_in

    @property
    def r_out(self) -> float:
        """Fan-out over that of the base model."""
        return self.fan_out / self.base_fan_out

    @property
    def init(self) -> float:
        """Multiplier on the standard deviation at the start: 1/r_in for the readout, 1/sqrt(r_in) for the others."""
        # The readout sums features that align with it as they learn, so its sum grows as fan_in and not as its root.
        return 1 / self.r_in if self.role == "output" else 1 / math.sqrt(self.r_in)

    def resized(self, shape: Sequence[int]) -> Entry:
        """The same parameter in a model of another width."""
        # what is not width has no base: its ratio is 1 at every size
        fixed = _FIXED[self.role] | {"kernel", "stack"}
        base = tuple(
            size if dim in fixed else before
            for size, before, dim in zip(shape, self.base_shape, self.layout, strict=True)
        )
        return replace(self, shape=tuple(shape), base_shape=base)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "shape": list(self.shape),
            "base_shape": list(self.base_shape),
            "layout": list(self.layout),
            "kind": self.kind,
            "role": self.role,
            "tied": list(self.tied),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: if a dimension, kind or role is unknown, shapes do not match, or a field is missing.
        """
        try:
            entry = cls(
                shape=tuple(map(int, data["shape"])),
                base_shape=tuple(map(int, data["base_shape"])),
                layout=tuple(data["layout"]),
                kind=data["kind"],
                role=data["role"],
                tied=tuple(data["tied"]),
            )
        except KeyError as error:
            raise ValueError(f"an entry of a plan needs a field {error}") from None
        for what, value, known in (
            *(("dimension", dim, get_args(Dim)) for dim in entry.layout),
            ("kind", entry.kind, get_args(ParameterKind)),
            ("role", entry.role, get_args(Role)),
        ):
            if value not in known:
                raise ValueError(f"a {what} of a plan is one of {', '.join(known)}; got {value!r}")
        if not len(entry.shape) == len(entry.base_shape) == len(entry.layout):
            raise ValueError(f"shape, base_shape and layout must be equally long, got {dict(data)}")
        return entry


def role_of(layout: Sequence[Dim], shape: Sequence[int], base_shape: Sequence[int]) -> Role:
    """The role according to the shapes: which fans differ from those of the base model."""
    if not {"in", "kernel"} & set(layout):
        return "vector"
    grows = {dim for dim, size, before in zip(layout, shape, base_shape, strict=True) if size != before}
    if "in" in grows:
        return "hidden" if "out" in grows else "output"
    return "input" if "out" in grows else "fixed"


def _product(shape: Sequence[int], layout: Sequence[Dim], *dims: Dim) -> int:
    return math.prod(size for size, dim in zip(shape, layout, strict=True) if dim in dims)
