"""Optimizers for a model under a width plan, by name: the method, and AdamW for the parameters that it does not
take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from adabatch.arguments import checked, require, require_one_of
from adabatch.optim.kfac import KFAC
from adabatch.optim.mup.laws import Method as LawName
from adabatch.optim.mup.plans import Plan
from adabatch.optim.shampoo import Shampoo

Made = Optimizer | Sequence[Optimizer]
TrainingMethod = Callable[[nn.Module, Plan, float, float | None], Made]
"""A model, its plan, learning rate and damping (None: the method's default) -> the optimizer, or several."""

OTHERS_LR = 1e-3
"""Learning rate of AdamW, for the parameters that a method does not take."""


def _sgd(model: nn.Module, plan: Plan, lr: float, damping: float | None) -> Made:
    return torch.optim.SGD(plan.groups(model, "sgd", lr=lr, damping=damping))


def _adamw(model: nn.Module, plan: Plan, lr: float, damping: float | None) -> Made:
    return torch.optim.AdamW(plan.groups(model, "adamw", lr=lr, damping=damping))


def _shampoo(model: nn.Module, plan: Plan, lr: float, damping: float | None) -> Made:
    return Shampoo(plan.groups(model, "shampoo", lr=lr, damping=damping))


def _muon(model: nn.Module, plan: Plan, lr: float, damping: float | None) -> Made:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon: it came with torch 2.9")
    taken = plan.groups(model, "muon", lr=lr, damping=damping, only=plan.taken_by("muon"))
    return [torch.optim.Muon(taken), *_others(model, plan, "muon")]


def _kfac(model: nn.Module, plan: Plan, lr: float, damping: float | None, **options: Any) -> Made:
    taken = plan.groups(model, "kfac", lr=lr, damping=damping, only=plan.taken_by("kfac"))
    return [KFAC(taken, model, **options), *_others(model, plan, "kfac")]


def _others(model: nn.Module, plan: Plan, method: LawName) -> list[Optimizer]:
    left = plan.left_by(method)
    return [torch.optim.AdamW(plan.groups(model, "adamw", lr=OTHERS_LR, only=left))] if left else []


METHODS: Mapping[str, TrainingMethod] = MappingProxyType(
    {"sgd": _sgd, "adamw": _adamw, "muon": _muon, "shampoo": _shampoo, "kfac": _kfac}
)

CHECKED_METHODS: Mapping[str, TrainingMethod] = MappingProxyType({**METHODS, "kfac": partial(_kfac, kl_clip=None)})
"""The methods for a check of single updates: K-FAC without its clip. That is one factor for all layers, so a layer
whose law is wrong would change the updates of the others."""

FIRST_LRS: Mapping[str, float] = MappingProxyType(
    {"sgd": 0.05, "adamw": 0.01, "muon": 0.05, "shampoo": 0.05, "kfac": 0.05}
)
"""A learning rate at which one step can be measured."""


@checked
def optimizers_for(
    method: str, model: nn.Module, plan: Plan, *, lr: float, damping: float | None = None
) -> list[Optimizer]:
    """The optimizer of a model under its plan, or two if the method does not take all parameters.

    Args:
        method: "sgd", "adamw", "muon", "shampoo" or "kfac".
        model: the model.
        plan: of this model, from ``mup.plan``.
        lr: learning rate at the base width. AdamW trains the parameters that the method does not take (for Muon all but
            matrices, for K-FAC all but the layers that it supports), with 1e-3 at the base width.
        damping: eps, epsilon or damping at the base width; None for the method's default.

    Raises:
        ValueError: if the method is unknown, or for Muon with a torch before 2.9.
    """
    require_one_of("method", method, METHODS)
    require(0 <= lr < math.inf, "lr must be finite and not negative", lr)
    made = METHODS[method](model, plan, lr, damping)
    return [made] if isinstance(made, Optimizer) else list(made)
