"""Named pairs of the literature: an AdaGrad method beside a norm-test controller, in one call."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.optim import Adagrad, Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import checked, require
from adabatch.batch.criteria import NormTest
from adabatch.optim.adagrad_norm import AdaGradNorm
from adabatch.optim.parameters import listed


class Pair(NamedTuple):
    """An optimizer and the ``AdaptiveBatch`` around it; unpack it.

    Args:
        optimizer: steps as usual.
        batches: gives the steps.
    """

    optimizer: Optimizer
    batches: AdaptiveBatch


@checked
def AdAdaGrad(
    model: torch.nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 8e-3,
    eta: float = 0.1,
    weight_decay: float = 0.0,
    **batching: Any,
) -> Pair:
    """AdaGrad (torch's) with the norm test.

        optimizer, batches = AdAdaGrad(model, micro_batch_size=8, limits=Limits(min=16, max=4096))

    The defaults are those of the published MNIST experiments (learning rate 8e-3, eta 0.1, no change of the learning
    rate with the batch), but the test is averaged and followed cautiously; ``control=Control.direct()`` follows each
    test at once, as published.

    Args:
        model: plain or in ``DistributedDataParallel``.
        params: parameters or groups for the optimizer; by default all of the model's.
        lr: base learning rate.
        eta: tolerance of the norm test. At its rest an example is worth ``eta^2`` of one in a small batch: 1 % at 0.1.
        weight_decay: the L2 penalty of ``torch.optim.Adagrad``.
        batching: everything else that ``AdaptiveBatch`` takes; ``micro_batch_size`` and ``limits`` must be there, and
            ``lr_rule`` is "none" by default, as published.

    Raises:
        ValueError: for the reasons of ``AdaptiveBatch``, ``NormTest`` and the optimizer.

    Source: Lau, Liu, Kolar 2024 (AdAdaGrad), algorithm 1 with AdaGrad.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        require(0 <= value < math.inf, f"{name} must be finite and not negative", value)
    optimizer = Adagrad(_parameters(model, params), lr=lr, weight_decay=weight_decay)
    return Pair(optimizer, AdaptiveBatch(model, optimizer, NormTest(eta=eta), **{"lr_rule": "none"} | batching))


@checked
def AdAdaGradNorm(
    model: torch.nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1.0,
    eta: float = 0.1,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    **batching: Any,
) -> Pair:
    """AdaGrad-Norm, one step size for the whole model, with the norm test.

        optimizer, batches = AdAdaGradNorm(model, micro_batch_size=8, limits=Limits(min=16, max=4096))

    Args:
        model: plain or in ``DistributedDataParallel``.
        params: parameters or groups for the optimizer; by default all of the model's.
        lr: base learning rate, the numerator of AdaGrad-Norm's step size.
        eta: tolerance of the norm test. At its rest an example is worth ``eta^2`` of one in a small batch: 1 % at 0.1.
        weight_decay: decoupled weight decay of ``AdaGradNorm``.
        momentum: of ``AdaGradNorm``.
        batching: everything else that ``AdaptiveBatch`` takes; ``micro_batch_size`` and ``limits`` must be there, and
            ``lr_rule`` is "none" by default, as published.

    Raises:
        ValueError: for the reasons of ``AdaptiveBatch``, ``NormTest`` and the optimizer.

    Source: Lau, Liu, Kolar 2024 (AdAdaGrad), algorithm 1 with AdaGrad-Norm; Ward, Wu, Bottou 2020.
    """
    optimizer = AdaGradNorm(_parameters(model, params), lr=lr, weight_decay=weight_decay, momentum=momentum)
    return Pair(optimizer, AdaptiveBatch(model, optimizer, NormTest(eta=eta), **{"lr_rule": "none"} | batching))


def _parameters(model: torch.nn.Module, params: Iterable[Any] | None) -> list[Any]:
    if params is not None:
        return listed(params)
    every = list(model.parameters())
    require(len(every) > 0, "the model must have parameters", type(model).__name__)
    return every
