"""The factors of the layers: averages over observations, with a memory counted in examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adabatch.optim.kfac.damping import Factor
from adabatch.optim.kfac.layers import Layer

SIDES = ("input", "output")


@dataclass(eq=False)
class WatchedLayer:
    """A layer whose factors are kept.

    Args:
        name: its name in the model, without the names of wrappers.
        kind: what it does with its weight.
        diagonal_input: whether its input factor is diagonal.
        dims: d_in, d_out.
        holder: the layer's first parameter in the optimizer.
        state: the optimizer's state of the holder, which contains the factors.
    """

    name: str
    kind: Layer
    diagonal_input: bool
    dims: tuple[int, int]
    holder: Tensor
    state: dict[str, Any]

    @property
    def cost(self) -> float:
        """The cost of inverting both factors, in multiplications: the cubes of their sides."""
        d_in, d_out = self.dims
        return float(d_out) ** 3 + (float(d_in) if self.diagonal_input else float(d_in) ** 3)


@dataclass
class FactorSums:
    """Sums over all rows of one layer since the last step.

    Args:
        num_rows: rows of inputs: examples times positions, over all calls of the layer.
        input_sum: sum of ``h h^T``, shape (d_in, d_in), or (d_in,) if it is diagonal.
        output_sum: sum of ``delta delta^T``, shape (d_out, d_out).
        input_rows, output_rows: the rows themselves instead of the sums, if rows are kept.
    """

    num_rows: float = 0.0
    input_sum: Tensor | None = None
    output_sum: Tensor | None = None
    input_rows: list[Tensor] = field(default_factory=list)
    output_rows: list[Tensor] = field(default_factory=list)


@dataclass
class Sums:
    """The number of examples in a step's micro-batches, and sums for each layer."""

    num_examples: float = 0.0
    layers: dict[str, FactorSums] = field(default_factory=dict)


def allocate(layer: WatchedLayer, *, dtype: torch.dtype, device: torch.device) -> None:
    """Allocates the factors of a layer, so that a checkpoint can be loaded before the first observation."""
    d_in, d_out = layer.dims
    shape = (d_in,) if layer.diagonal_input else (d_in, d_in)
    layer.state["input_moment"] = torch.zeros(shape, dtype=dtype, device=device)
    layer.state["output_moment"] = torch.zeros((d_out, d_out), dtype=dtype, device=device)
    for counter in ("observed", "not_finite"):
        layer.state[counter] = torch.zeros(1, dtype=torch.float64, device=device)


def factor(layer: WatchedLayer, side: str, trace: float) -> Factor:
    """The present factor of one side."""
    rows = layer.state.get(f"{side}_rows")
    return Factor(layer.state[f"{side}_moment"], trace) if rows is None else Factor(rows, trace, in_rows=True)


def traces(layers: Sequence[WatchedLayer]) -> Tensor:
    """The traces of each layer's input and output factors, and its two counters; shape (num_layers, 4), float64."""
    values = []
    # In one tensor, so that a single host sync reads all of them.
    for layer in layers:
        for side in SIDES:
            rows = layer.state.get(f"{side}_rows")
            values.append(_trace(layer.state[f"{side}_moment"]) if rows is None else rows.square().sum())
        values += [layer.state["observed"].squeeze(), layer.state["not_finite"].squeeze()]
    return torch.stack([value.double() for value in values]).view(len(layers), 4)


def _trace(moment: Tensor) -> Tensor:
    return moment.sum() if moment.dim() == 1 else moment.diagonal().sum()


def share_of(num_examples: float, *, memory: float) -> float:
    """The weight of an observation of ``num_examples`` in an exponential average over ``memory`` examples."""
    return 1 - math.exp(-num_examples / memory) if memory > 0 else 1.0


def average_in(layer: WatchedLayer, seen: FactorSums, *, num_examples: float, share: float) -> None:
    """Adds one observation to a layer's averages; one that is not finite is skipped and counted."""
    assert seen.input_sum is not None
    assert seen.output_sum is not None
    new = {"input": seen.input_sum.div_(seen.num_rows), "output": seen.output_sum.div_(num_examples)}
    # Traces are enough: a diagonal sums the squares of every number that its factor is made of.
    finite = torch.isfinite(_trace(new["input"]) + _trace(new["output"]))
    # The first observation is taken whole, and the averages are not corrected for that. Curvature falls fast at first,
    # and the memory of its beginning keeps the early steps short: on MNIST at width 256, corrected averages diverged at
    # a learning rate of 1/8 with three seeds of three, where these train.
    part = torch.where(layer.state["observed"] > 0, share, 1.0)
    for side, value in new.items():
        old = layer.state[f"{side}_moment"]
        # where(), and not a share of zero: 0 x NaN is NaN.
        old.lerp_(torch.where(finite, value.to(old), old), part.to(old.dtype))
    layer.state["observed"] += finite
    layer.state["not_finite"] += ~finite


def keep_rows(layer: WatchedLayer, seen: FactorSums, *, num_examples: float) -> None:
    """Replaces all earlier observations by this one: by its rows, or by their moment if there are many rows."""
    for side, rows, number in (
        ("input", seen.input_rows, seen.num_rows),
        ("output", seen.output_rows, num_examples),
    ):
        layer.state.pop(f"{side}_rows", None)
        if not rows:  # a diagonal
            assert seen.input_sum is not None
            layer.state[f"{side}_moment"].copy_(seen.input_sum / number)
            continue
        stacked = torch.cat(rows) / math.sqrt(number)
        # With fewer rows than columns, the Gram matrix of the rows is the smaller one to decompose.
        if len(stacked) < stacked.shape[1]:
            layer.state[f"{side}_rows"] = stacked
        else:
            layer.state[f"{side}_moment"].copy_(stacked.T @ stacked)
    layer.state["observed"] += 1


def pack(layers: Sequence[WatchedLayer], sums: Sums) -> Tensor:
    """All sums in one tensor, for one reduction over the ranks: two counts per layer, and upper triangles."""
    pieces = []
    for layer in layers:
        seen = sums.layers.get(layer.name, FactorSums())
        like = layer.state["input_moment"]
        pieces.append(torch.tensor([sums.num_examples, seen.num_rows], dtype=like.dtype, device=like.device))
        for side in SIDES:
            template = layer.state[f"{side}_moment"]
            moment = getattr(seen, f"{side}_sum")
            moment = torch.zeros_like(template) if moment is None else moment.to(template)
            pieces.append(moment if moment.dim() == 1 else moment[_triangle(moment)])
    return torch.cat(pieces)


def unpack(packed: Tensor, layers: Sequence[WatchedLayer]) -> Sums:
    """The inverse of ``pack``."""
    sums, start = Sums(), 0
    counts = []
    for layer in layers:
        counts.append(packed[start : start + 2])
        start += 2
        seen = sums.layers[layer.name] = FactorSums()
        for side in SIDES:
            template = layer.state[f"{side}_moment"]
            size = template.shape[0] if template.dim() == 1 else template.shape[0] * (template.shape[0] + 1) // 2
            values, start = packed[start : start + size], start + size
            if template.dim() == 2:
                upper = torch.zeros_like(template)
                upper[_triangle(template)] = values
                values = upper + upper.triu(1).T
            setattr(seen, f"{side}_sum", values)
    for layer, (num_examples, num_rows) in zip(layers, torch.stack(counts).tolist(), strict=True):  # host sync
        sums.num_examples, sums.layers[layer.name].num_rows = num_examples, num_rows
    return sums


def _triangle(moment: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(*moment.shape, device=moment.device)
    return rows, columns
