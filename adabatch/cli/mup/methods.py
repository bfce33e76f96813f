"""Methods of ``adabatch mup`` by name: what trains a model under a width plan."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from adabatch.optim import KFAC, Shampoo, mup

Made = Optimizer | Sequence[Optimizer]
Method = Callable[[nn.Module, mup.Plan, float, float | None], Made]
"""A model, its plan, learning rate and damping (None: the method's default) -> what trains it."""

OTHERS_LR = 1e-3
"""Learning rate of AdamW, for the parameters that a method does not take."""


def _sgd(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Made:
    return torch.optim.SGD(plan.groups(model, "sgd", lr=lr, damping=damping))


def _adamw(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Made:
    return torch.optim.AdamW(plan.groups(model, "adamw", lr=lr, damping=damping))


def _shampoo(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Made:
    return Shampoo(plan.groups(model, "shampoo", lr=lr, damping=damping))


def _muon(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Made:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon: it came with torch 2.9")
    taken = plan.groups(model, "muon", lr=lr, damping=damping, only=plan.taken_by("muon"))
    return [torch.optim.Muon(taken), *_others(model, plan, "muon")]


def _kfac(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Made:
    taken = plan.groups(model, "kfac", lr=lr, damping=damping, only=plan.taken_by("kfac"))
    return [KFAC(taken, model), *_others(model, plan, "kfac")]


def _others(model: nn.Module, plan: mup.Plan, method: Any) -> list[Optimizer]:
    left = plan.left_by(method)
    return [torch.optim.AdamW(plan.groups(model, "adamw", lr=OTHERS_LR, only=left))] if left else []


METHODS: Mapping[str, Method] = MappingProxyType(
    {"sgd": _sgd, "adamw": _adamw, "muon": _muon, "shampoo": _shampoo, "kfac": _kfac}
)

LRS: Mapping[str, float] = MappingProxyType({"sgd": 0.05, "adamw": 0.01, "muon": 0.05, "shampoo": 0.05, "kfac": 0.05})
"""A learning rate at which one step can be measured."""


def method_of(name: str) -> Method:
    """A method by its name, or a function of the user's by its import path.

    Raises:
        ValueError: neither.
    """
    if "." in name:
        found: Method = imported(name)
        return found
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, or the import path of a function of (model, plan, lr, "
            f"damping) that returns an optimizer; got {name!r}"
        )
    return METHODS[name]


def imported(path: str) -> Any:
    """What an import path names, such as ``package.module.function``.

    Raises:
        ValueError: nothing that can be imported and called.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported ({error}): give package.module.function") from error
    if not callable(found):
        raise ValueError(f"{path} is no function or class, but {type(found).__name__}")
    return found
