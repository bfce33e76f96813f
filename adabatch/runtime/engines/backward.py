"""How the backward of a micro-batch runs, and by what factor it makes the gradients too large.

float16 loses small gradients, so mixed precision multiplies the loss by a large factor before its backward and divides
the gradients by it before the update. All that a probe sees lies between the two. ``Backward`` is the one place that
knows the factor; the moments are divided by it where the numbers of all ranks arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


def _plain(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


class Backward(NamedTuple):
    """A way to run backwards.

    Args:
        run: the backward of a micro-batch's share of the loss.
        scale: device -> the factor on every gradient of the step that is under way, the same on all ranks, shape (), on
            that device and without a host sync. Called after the step's last backward and before its update. None where
            nothing scales.
    """

    run: Callable[[Tensor], None] = _plain
    scale: Callable[[torch.device], Tensor] | None = None


PLAIN = Backward()
"""``loss.backward()``."""


def scaled_by(scaler: GradScaler) -> Backward:
    """Backwards of losses that ``torch.amp.GradScaler`` scales; plain ones where it is not enabled.

    Raises:
        TypeError: something else, such as the string that names a precision.
    """
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
    if not scaler.is_enabled():
        return PLAIN

    def run(loss: Tensor) -> None:
        _plain(scaler.scale(loss))

    def scale(device: torch.device) -> Tensor:
        # Scaling a one reads the factor where it lies; get_scale() would copy it to the host, and wait.
        return scaler.scale(torch.ones((), device=device))

    return Backward(run, scale)


def left_out(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` found gradients that are not finite, in the ``step()`` of ``optimizer`` under way.

    Fused optimizers are told by attributes, and run without an effect; ``step()`` of any other is not called at all.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)  # host sync, which a GradScaler makes for every other optimizer
