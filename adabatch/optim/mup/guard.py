"""Checks the ratios of a plan's learning rates, which a scheduler that sets absolute rates would change."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adabatch.arguments import checked

TOLERANCE = 1e-5
"""Relative tolerance; float32 rates that were multiplied many times stay well within it."""


@checked
def guard(optimizer: Optimizer) -> RemovableHandle:
    """Makes every step of the optimizer check the learning rates first, as ``check_ratios`` does.

    Returns:
        A handle, whose ``remove()`` ends the checks.
    """

    def before(optimizer: Optimizer, *_: Any) -> None:
        check_ratios(optimizer)

    return optimizer.register_step_pre_hook(before)


@checked
def check_ratios(optimizer: Optimizer) -> None:
    """Checks that the rates of groups from one call of ``Plan.groups`` still have the plan's ratios.

    Schedules that multiply keep the ratios: ``ProgressLR``, ``LambdaLR``, ``CosineAnnealingLR(eta_min=0)``, a warm-up.
    Schedules that set a rate do not: ``OneCycleLR`` or ``CyclicLR`` with one number, a floor such as ``eta_min=1e-5``
    or ``min_lr``, a loop that writes ``group["lr"]``. Groups without a plan, and groups of other calls with another
    ``lr``, are not compared, nor is a rate that is a tensor on an accelerator.

    Raises:
        ValueError: if they do not; names the rate, the right one, and what to do.
    """
    first: dict[float, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        rate = group["lr"]
        # reading a rate on an accelerator would wait for the device
        if "mup_lr" not in group or (isinstance(rate, Tensor) and not rate.is_cpu):
            continue
        common = float(rate) / group["mup_lr"]
        # By base rate: groups of several calls may be in one optimizer, each call with its own.
        expected = first.setdefault(group["mup_base_lr"], common)
        # written so that NaN fails too
        if not abs(common - expected) <= TOLERANCE * abs(expected):
            raise ValueError(
                f"parameter group {number} has the learning rate {float(rate):.6g}, but its width asks for "
                f"{expected * group['mup_lr']:.6g}, {group['mup_lr']:.4g} times the common one: a scheduler that sets "
                f"absolute rates has undone the plan's ratios. Use one that multiplies (adabatch.ProgressLR, LambdaLR, "
                f"cosine with eta_min=0), or give it one rate per group, each times the group's mup_lr"
            )
