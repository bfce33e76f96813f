"""Whether a step's loss and gradient are finite, for steps in which no probe reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from adabatch.arguments import shown
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.optimizers.joined import each_of
from adabatch.runtime.wrappers.fsdp2 import own_values

SkipNonfinite = bool | Literal["probed"]
"""In which steps an update whose loss or gradient is not finite is left out: all, none, or those with a probe."""

FindNonfinite = Callable[[Tensor], Tensor]
"""This rank's loss, shape () -> 0 if loss and gradient are finite, else 1; shape (1,), float64."""


def check_skip_nonfinite(value: object) -> None:
    """Checks that the value is one of the choices, and not merely something true or false.

    Raises:
        ValueError: if it is not True, False or "probed".
    """
    if not (isinstance(value, bool | np.bool_) or (isinstance(value, str) and value == "probed")):
        raise ValueError(f"skip_nonfinite must be True, False or 'probed', got {shown(value)}")


def nonfinite_search(optimizer: Optimizer, skip: SkipNonfinite, engine: Engine) -> FindNonfinite | None:
    """The check of steps in which no probe reads loss and gradient; None if they are not checked.

    Args:
        optimizer: applies the gradients.
        skip: in which steps an update that is not finite is left out.
        engine: may scale the gradients. A scaler checks each of several optimizers separately, and would leave out a
            part of an update.
    """
    by_parts = engine.backward.scale is not None and len(each_of(optimizer)) > 1
    return nonfinite_in(optimizer) if skip is True or by_parts else None


def nonfinite_in(optimizer: Optimizer) -> FindNonfinite:
    """Checks this rank's pieces of the gradients that an optimizer is about to apply.

    One pass over the gradient, without a host sync.
    """

    def find(loss: Tensor) -> Tensor:
        pieces = list(_gradients(optimizer))
        found = ~torch.isfinite(loss)
        if pieces:
            # the largest absolute value, not the sum of squares: that of a finite gradient could overflow
            largest = get_total_norm(pieces, norm_type=math.inf)
            found = found.to(largest.device) | ~torch.isfinite(largest)
        return found.double().view(1)

    return find


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # a rank may hold no element of a short parameter
            if parameter.grad is not None and (values := own_values(parameter.grad)).numel():
                yield values
