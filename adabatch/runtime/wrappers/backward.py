"""How the backward of a micro-batch runs, and by which factor it scales the gradients.

float16 loses small gradients, so mixed precision multiplies the loss by a large factor before its backward, and divides
the gradients by it before the update. A probe sees the scaled gradients between the two. Only ``Backward`` knows the
factor; the moments are divided by it once the numbers of all ranks have been summed.
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
        run: runs the backward of a micro-batch's share of the loss.
        scale: device -> the factor on all gradients of the present step, equal on all ranks, shape (), on that device
            and without a host sync. Called after the step's last backward and before its update. None if the gradients
            are not scaled.
    """

    run: Callable[[Tensor], None] = _plain
    scale: Callable[[torch.device], Tensor] | None = None


PLAIN = Backward()
"""``loss.backward()``."""


def scaled_by(scaler: GradScaler) -> Backward:
    """A backward whose loss ``torch.amp.GradScaler`` scales; a plain one if the scaler is not enabled.

    Raises:
        TypeError: if ``scaler`` is not a ``GradScaler``.
    """
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
    if not scaler.is_enabled():
        return PLAIN

    def run(loss: Tensor) -> None:
        _plain(scaler.scale(loss))

    return Backward(run, factor_of(scaler))


def factor_of(scaler: GradScaler) -> Callable[[torch.device], Tensor] | None:
    """The factor by which a scaler multiplies the gradients, as ``Backward.scale``; None if it is not enabled."""
    if not scaler.is_enabled():
        return None

    def scale(device: torch.device) -> Tensor:
        # Scaling a one keeps the factor on the device; get_scale() would copy it to the host, and wait.
        return scaler.scale(torch.ones((), device=device))

    return scale


def left_out(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` found gradients that are not finite, during a ``step()`` of ``optimizer``.

    Fused optimizers read this from an attribute, and their step has no effect; of others, ``step()`` is not called.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)  # host sync, which a GradScaler makes for every other optimizer
