"""Outer optimizers: how the next round begins after the workers' parameters were averaged.

A round takes the workers from the *anchor*, their common parameters at its beginning, to different parameters, of which
the mean is given. The difference is the outer gradient, ``anchor - mean``. All these numbers are equal on all workers,
so each of them computes the outer step and nothing more is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from adabatch.arguments import check_fields, require


@runtime_checkable
class OuterOptimizer(Protocol):
    """An outer optimizer: settings only; ``LocalSGD`` holds its momentum, one tensor per parameter."""

    @property
    def needs_anchor(self) -> bool:
        """Whether it needs the parameters at the beginning of the round; if not, it only uses the mean."""
        ...

    def step(
        self, parameters: Sequence[Tensor], anchors: Sequence[Tensor], momenta: list[Tensor], *, lr: float
    ) -> None:
        """Changes ``parameters``, which hold the mean, in place to those with which the next round begins.

        Args:
            parameters, anchors: the mean, and the parameters at the beginning of the round.
            momenta: updated in place; empty before the first step.
            lr: the largest learning rate of the inner optimizer's groups in the round.
        """
        ...


@dataclass(frozen=True)
class Average:
    """The next round begins at the mean: local SGD itself (Stich 2019)."""

    needs_anchor: ClassVar[bool] = False

    def step(
        self, parameters: Sequence[Tensor], anchors: Sequence[Tensor], momenta: list[Tensor], *, lr: float
    ) -> None:
        """Nothing: the parameters already hold the mean."""


@dataclass(frozen=True)
class Nesterov:
    """SGD with Nesterov momentum on the outer gradient, as in DiLoCo.

        m = momentum m + (anchor - mean);  next = anchor - lr ((anchor - mean) + momentum m)

    Args:
        lr: outer learning rate; 0.7 in DiLoCo. ``lr=1, momentum=0`` is ``Average``.
        momentum: in [0, 1); 0.9 in DiLoCo.

    Raises:
        ValueError: if a value is outside its range.

    Source: Douillard et al. 2023 (DiLoCo), algorithm 1 and section 3.1.
    """

    lr: float = 0.7
    momentum: float = 0.9
    needs_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self.lr, self.momentum)

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], anchors: Sequence[Tensor], momenta: list[Tensor], *, lr: float
    ) -> None:
        """The outer step."""
        begin_momenta(momenta, parameters)
        for parameter, anchor, momentum in zip(parameters, anchors, momenta, strict=True):
            # reused for the sum below: anchors and momenta already take the memory of two more models
            gradient = anchor - parameter
            momentum.mul_(self.momentum).add_(gradient)
            parameter.copy_(anchor.sub(gradient.add_(momentum, alpha=self.momentum), alpha=self.lr))


@dataclass(frozen=True)
class SlowMo:
    """Slow momentum: heavy-ball momentum on the outer gradient in units of the inner learning rate.

        m = momentum m + (anchor - mean) / inner lr;  next = anchor - lr (inner lr) m

    The momentum has the same meaning at any inner learning rate. ``lr=1, momentum=0`` is ``Average``.

    Args:
        momentum: in [0, 1); the source finds 0.4 to 0.8 best.
        lr: outer learning rate; 1 in most of the source.

    Raises:
        ValueError: if a value is outside its range.

    Source: Wang, Tantia, Ballas, Rabbat 2020 (SlowMo), algorithm 1. Of its choices for the inner optimizer's state,
    "maintain" is the default of ``LocalSGD``, and "average" is ``average_state=True``.
    """

    momentum: float
    lr: float = 1.0
    needs_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self.lr, self.momentum)

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], anchors: Sequence[Tensor], momenta: list[Tensor], *, lr: float
    ) -> None:
        """The outer step; with an inner rate of zero no worker has moved, and nothing changes."""
        if lr == 0:
            return
        begin_momenta(momenta, parameters)
        for parameter, anchor, momentum in zip(parameters, anchors, momenta, strict=True):
            # in units of the inner rate, so that a schedule of that rate does not change what the momentum means
            momentum.mul_(self.momentum).add_(anchor - parameter, alpha=1 / lr)
            parameter.copy_(anchor.sub(momentum, alpha=self.lr * lr))


def begin_momenta(momenta: list[Tensor], parameters: Sequence[Tensor]) -> None:
    """Zeros for every parameter, if there is no momentum yet."""
    if not momenta:
        momenta.extend(torch.zeros_like(parameter) for parameter in parameters)


def _check(lr: float, momentum: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"the outer lr must be a positive number, got {lr}: DiLoCo has 0.7, SlowMo 1.0")
    require(0 <= momentum < 1, "the outer momentum must be in [0, 1)", momentum)
