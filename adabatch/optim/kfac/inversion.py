"""Computes the operators that precondition a gradient from the factors, with fallbacks for failed factorizations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adabatch.optim.kfac.averages import WatchedLayer
from adabatch.optim.kfac.damping import Damping, DampingForm, Factor, FactorPair, kronecker
from adabatch.optim.kfac.roots import EigenBasis, Inverted, Root, eigen_basis, inverse, power, power_of_rows

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError

TRACE_FLOOR = 1e-30
"""Trace up to which a factor counts as zero (dead units, or a zero readout). Its layer then takes no step."""


class Exponents(NamedTuple):
    """Powers of the inverse factors: (1, 1) for K-FAC, (0, 1) input side only, (1, 0) output side only, (0, 0) SGD."""

    output: float = 1.0
    input: float = 1.0


@dataclass(eq=False)
class FactorBlock:
    """A parameter with its own preconditioner: the weight or the bias of a layer.

    Args:
        layer: the layer.
        param: the parameter.
        is_bias: whether it is the bias.
        state: the optimizer's state of the parameter, which contains its roots.
        group: its parameter group, which contains the damping.
    """

    layer: WatchedLayer
    param: Tensor
    is_bias: bool
    state: dict[str, Any]
    group: dict[str, Any]


def allocate(
    block: FactorBlock, exponents: Exponents, *, exact: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Allocates the roots of a block. They are zeros, so a block takes no step before its first inversion."""
    d_in, d_out = block.layer.dims
    shapes: dict[str, tuple[int, ...]] = {"output_root": (d_out, d_out) if exponents.output else ()}
    if not block.is_bias:
        full = (d_in,) if block.layer.diagonal_input else (d_in, d_in)
        shapes["input_root"] = full if exponents.input else ()
        if exact:
            shapes = {"output_basis": (d_out, d_out), "input_basis": full, "inverse": (d_out, d_in)}
    for name, shape in shapes.items():
        block.state[name] = torch.zeros(shape, dtype=dtype, device=device)


def roots_of(block: FactorBlock) -> list[Tensor]:
    """The tensors that precondition the block, in the same order on all ranks."""
    names = ("output_root", "output_scale", "input_root", "input_scale", "output_basis", "input_basis", "inverse")
    return [block.state[name] for name in names if name in block.state]


def precondition(block: FactorBlock, grad: Tensor) -> Tensor:
    """Applies the block's roots to a gradient of the shape of its parameter."""
    state = block.state
    if block.is_bias:
        return Root(state["output_root"], state.get("output_scale")).of_rows(grad.unsqueeze(-1)).squeeze(-1)
    kind = block.layer.kind
    matrix = kind.matrix(grad)
    if "inverse" in state:
        turned = EigenBasis(state["output_basis"], state["input_basis"], state["inverse"]).of(matrix)
    else:
        turned = Root(state["output_root"], state.get("output_scale")).of_rows(matrix)
        turned = Root(state["input_root"], state.get("input_scale")).of_columns(turned)
    return kind.shaped(turned, grad)


class Inversion:
    """Computes the roots of blocks.

    Args:
        form: the form of the damping; None for the exact inverse of the damped product.
        exponents: powers of the inverse factors.
        fallbacks: counts the fallbacks, by kind.
    """

    def __init__(self, form: DampingForm | None, exponents: Exponents, fallbacks: Counter[str]) -> None:
        self._form = form
        self._exponents = exponents
        self._fallbacks = fallbacks

    def run(self, pairs: Iterable[tuple[FactorBlock, FactorPair]]) -> None:
        """Computes new roots for the blocks from their factors; a block whose factorization fails keeps the old ones.

        All Cholesky factorizations are queued before the first is checked, so that one host sync serves all of them.
        """
        tried: dict[tuple[str, str, float], Inverted] = {}
        requests: list[tuple[FactorBlock, str, tuple[str, str, float], Factor]] = []
        for block, pair in pairs:
            if min(pair.input.trace, pair.output.trace) <= TRACE_FLOOR:
                self._fallbacks["no curvature"] += 1
                for root in roots_of(block):
                    root.zero_()
                continue
            if self._form is None:
                self._exact(block, pair)
                continue
            damping = self._form(pair, block.group)
            for side, factor, exponent, rho in self._sides(block, pair, damping):
                # A Cholesky factorization inverts whole matrices; powers, rows and diagonals go another way.
                if exponent != 1 or factor.in_rows or factor.values.dim() == 1:
                    self._by_power(block, side, factor, exponent, rho)
                    continue
                key = (block.layer.name, side, rho)  # a weight and its bias share B
                if key not in tried:
                    tried[key] = inverse(factor.values, damping=rho, trace=factor.trace, dtype=factor.values.dtype)
                requests.append((block, side, key, factor))
        self._settle(tried, requests)

    def _sides(self, block: FactorBlock, pair: FactorPair, damping: Damping) -> list[tuple[str, Factor, float, float]]:
        sides = [("output", pair.output, self._exponents.output, damping.output)]
        if not block.is_bias:
            sides.append(("input", pair.input, self._exponents.input, damping.input))
        return sides

    def _settle(
        self,
        tried: dict[tuple[str, str, float], Inverted],
        requests: list[tuple[FactorBlock, str, tuple[str, str, float], Factor]],
    ) -> None:
        if not tried:
            return
        failed = torch.stack([each.info for each in tried.values()]).tolist()  # host sync
        bad = {key for key, info in zip(tried, failed, strict=True) if info}
        again: dict[tuple[str, str, float], Root | None] = {}
        for block, side, key, factor in requests:
            root: Root | None = tried[key].root
            if key in bad:
                # Once for a factor that several blocks share.
                if key not in again:
                    self._fallbacks["float64 inverse"] += 1
                    second = inverse(factor.values, damping=key[2], trace=factor.trace, dtype=torch.float64)
                    again[key] = second.root if int(second.info) == 0 else None
                root = again[key]
            self._put(block, side, root)

    def _by_power(self, block: FactorBlock, side: str, factor: Factor, exponent: float, rho: float) -> None:
        try:
            if factor.in_rows and exponent:
                root = power_of_rows(factor.values, exponent, damping=rho)
            else:
                root = power(factor.values, exponent, damping=rho, trace=factor.trace)
        except LinAlgError:
            self._put(block, side, None)
            return
        self._put(block, side, root)

    def _exact(self, block: FactorBlock, pair: FactorPair) -> None:
        damping = kronecker(block.group)
        try:
            if block.is_bias:
                self._put(block, "output", power(pair.output.values, 1, damping=damping, trace=pair.output.trace))
                return
            basis = eigen_basis(pair.input.values, pair.output.values, damping=damping)
        except LinAlgError:
            self._fallbacks["kept inverse"] += 1
            return
        for name, value in basis._asdict().items():
            block.state[name].copy_(value)

    def _put(self, block: FactorBlock, side: str, root: Root | None) -> None:
        if root is None:
            self._fallbacks["kept inverse"] += 1
            return
        # Not a copy: a weight and its bias may share the root of B.
        block.state[f"{side}_root"] = root.core
        # The form may change from rows to a matrix when the batch grows.
        block.state.pop(f"{side}_scale", None)
        if root.scale is not None:
            block.state[f"{side}_scale"] = root.scale
