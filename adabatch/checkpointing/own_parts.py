"""Whether the parts of a checkpoint are those of the run whose ``AdaptiveBatch`` is among them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.runtime.optimizers.joined import kind_of, same_groups


def check_own_parts(batches: AdaptiveBatch, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Checks that the model and the optimizer are those of the run; they may be wrapped.

    Raises:
        ValueError: if the model has none of the parameters that the run trains, or it is another optimizer.
    """
    trained = {id(p) for group in batches.optimizer.param_groups for p in group["params"]}
    if not any(id(p) in trained for p in model.parameters()):
        raise ValueError(
            f"the {type(model).__name__} has none of the parameters that the AdaptiveBatch trains, which would not be "
            f"saved: give model= the trained model, and others, such as an average of its weights, as others="
        )
    if optimizer is not None and not same_groups(optimizer, batches.optimizer):
        raise ValueError(
            f"the {kind_of(optimizer)} is another object than the {kind_of(batches.optimizer)} that the AdaptiveBatch "
            f"was given, whose state would not be saved: give optimizer= the same object"
        )


def warn_of_missing_parts(batches: AdaptiveBatch, optimizer: Optimizer | None, parts: Iterable[object]) -> None:
    """Warns, before the first save, of what a resumed run would begin again: the optimizer's state, or its data."""
    order = batches.order
    if order is not None and not any(part is order for part in parts):
        _warn("the GlobalOrder that steps() reads", "its data", "order=")
    if optimizer is None and any(batches.optimizer.state.values()):
        _warn(f"the state of the {kind_of(batches.optimizer)}", "its averages", "optimizer=")


def _warn(what: str, again: str, way_out: str) -> None:
    warnings.warn(
        f"{what} is not among the parts of the checkpoint, so that a resumed run would begin {again} again: give it as "
        f"{way_out}",
        RuntimeWarning,
        stacklevel=_lines_above(),
    )


def _lines_above() -> int:
    """The level of the line that called this package: ``save()``, or ``step()``, which calls it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == __name__.partition(".")[0]:
        level, frame = level + 1, frame.f_back
    return level
