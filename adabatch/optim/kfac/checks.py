"""Checks of the arguments of K-FAC."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adabatch.arguments import require
from adabatch.optim.kfac.inversion import Exponents
from adabatch.optim.kfac.survey import Survey
from adabatch.optim.parameters import listed
from adabatch.optim.placement import Reduce


def check_factors(exponents: Exponents, *, exact: bool, memory: float, refresh: float, observed: float) -> None:
    """Raises ``ValueError`` if settings of the factors are out of range or exclude each other."""
    if any(not 0 <= exponent <= 1 for exponent in exponents):
        raise ValueError(f"exponents (e_B, e_A) must be in [0, 1], got {tuple(exponents)}")
    if exact and exponents != Exponents():
        raise ValueError(f"damping_form='kronecker' inverts the product: exponents must be (1, 1), not {exponents}")
    if not (memory >= 0 and refresh >= 0):
        raise ValueError(f"memory and refresh are in examples and cannot be negative, got {memory} and {refresh}")
    if exact and memory == 0:
        raise ValueError("damping_form='kronecker' needs whole factors: memory must be positive, got 0")
    require(observed >= 1, "observed must be at least 1 example, or math.inf for all", observed)


def check_products(*, memory: float, bfloat16: bool) -> None:
    """Raises ``ValueError`` if there are no products that could be computed from bfloat16."""
    if bfloat16 and memory == 0:
        raise ValueError("bfloat16_products needs whole factors: memory must be positive, got 0, which keeps rows")


def check_step(*, momentum: float, kl_clip: float | None, others: str | None, **not_negative: float) -> None:
    """Raises ``ValueError`` if settings of the step are out of range."""
    for name, value in not_negative.items():
        require(0 <= value < math.inf, f"{name} must be zero or positive and finite", value)
    require(0 <= momentum < 1, "momentum must be in [0, 1)", momentum)
    require(kl_clip is None or kl_clip > 0, "kl_clip must be positive, or None for no clipping", kl_clip)
    if others not in (None, "adamw", "sgd"):
        raise ValueError(f"others must be 'adamw', 'sgd' or None, got {others!r}")


def plain_groups(params: ParamsT) -> list[dict[str, Any]]:
    """Parameter groups, from any form that torch's optimizers accept: tensors, named tensors, or dictionaries."""
    given = listed(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    result = []
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        plain = [member[1] if isinstance(member, tuple) else member for member in members]
        result.append({**group, "params": plain})
    return result


def refuse_zeros(found: Survey, groups: Sequence[Mapping[str, Any]], reduce: Reduce | None) -> None:
    """Raises ``ValueError`` if a trained weight is all zeros."""
    trained = {id(p) for group in groups for p in group["params"]}
    every = [(each.name, each.module.get_parameter("weight")) for each in found.layers]
    weights = {name: weight.detach() for name, weight in every if id(weight) in trained}
    if not weights:
        return
    # In a sharded model a rank sees its shard only, and may hold no row of a weight: the sum over the ranks decides.
    flags = [float(weight.any()) for weight in weights.values()]
    some = torch.tensor(flags, device=next(iter(weights.values())).device)
    some = some if reduce is None else reduce(some)
    zeros = [name for name, count in zip(weights, some.tolist(), strict=True) if not count]
    if zeros:
        raise ValueError(
            f"the weight of {', '.join(zeros)} is all zeros. Behind a zero readout no other layer has a gradient, so "
            f"the first K-FAC steps are regression on frozen features, and training stays near it, the more so the "
            f"larger the batch (Ishikawa and Karakida 2024): initialize it small instead (optim.mup.init_), or pass "
            f"allow_zero_weights=True if it is not a readout"
        )
