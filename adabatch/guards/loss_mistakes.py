"""Losses that are no mean: a sum over the micro-batch, or a mean that the loop has divided as it accumulates."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from adabatch.arguments import level_of_the_user

_SUM = 2
"""The value of torch's ``reduction`` argument that stands for "sum"."""


def warn_of_loss(loss: Tensor, num_parts: int) -> None:
    """Warns of a loss that ``step.backward`` would weight wrongly, as far as the last operations tell.

    It is no error: a factor on the loss may be meant.

    Args:
        loss: what ``step.backward`` is given.
        num_parts: micro-batches of the step on this rank.
    """
    last = loss.grad_fn
    if getattr(last, "_saved_reduction", None) == _SUM:
        said = (
            "step.backward takes the mean loss of the micro-batch, and was given a sum (reduction='sum'), so that the "
            "gradient grows with the micro-batch: use reduction='mean'; for means over tokens pass weigh= to steps()"
        )
    elif num_parts > 1 and _is_mean(_divided_by(last, num_parts), num_parts):
        said = (
            f"the mean loss was divided by {num_parts}, the number of micro-batches in the step, before step.backward, "
            f"which weights it itself, so that the gradient is {num_parts} times too small: give step.backward the "
            f"mean loss as it is (if the division is meant, filter this warning)"
        )
    else:
        return
    warnings.warn(said, RuntimeWarning, stacklevel=level_of_the_user())


def _divided_by(last: Any, number: int) -> Any:
    """What was divided by a number, if the last operation is such a division; else None."""
    if type(last).__name__ != "DivBackward0":
        return None
    by = getattr(last, "_saved_other", None)
    if isinstance(by, Tensor):
        by = float(by) if by.is_cpu and by.dim() == 0 else None
    return last.next_functions[0][0] if by == number else None


def _is_mean(last: Any, num_parts: int) -> bool:
    """Whether an operation is certainly the mean of the losses of examples."""
    kind = type(last).__name__
    if "CrossEntropy" in kind or kind.startswith("NllLoss"):
        return True
    # half of a mean of squares is a loss of its own
    return num_parts > 2 and (kind.startswith("Mean") or getattr(last, "_saved_reduction", None) == 1)
