"""Whether the parts of a checkpoint are those of the run whose ``AdaptiveBatch`` is among them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import level_of_the_user
from adabatch.runtime.optimizers.joined import each_of, kind_of, same_groups
from adabatch.runtime.optimizers.ownership import owners_of


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


def warn_of_missing_helpers(batches: AdaptiveBatch, parts: Collection[object]) -> None:
    """Warns, before the first save, of a gradient scaler and a scheduler of torch that a resumed run would begin
    again."""
    if batches.scaler is not None and not any(part is batches.scaler for part in parts):
        _warn("the GradScaler of the AdaptiveBatch", "its scale", "scaler=")
    if _is_scheduled(batches.optimizer) and not any(_is_schedule(part) for part in parts):
        _warn(f"the scheduler of the {kind_of(batches.optimizer)}", "its schedule", "schedule=")


def _is_scheduled(optimizer: Optimizer) -> bool:
    """Whether a scheduler of torch was made for an optimizer. A ``ProgressLR`` reads its place from the batches."""
    optimizers = each_of(optimizer)
    # torch marks the step() of such an optimizer
    marked = any(hasattr(one.step, "_wrapped_by_lr_sched") for one in optimizers)
    return marked and not owners_of(optimizers, kind="ProgressLR")


def _is_schedule(part: object) -> bool:
    # Also objects that wrap a scheduler or imitate one.
    return isinstance(part, LRScheduler) or "sched" in type(part).__name__.lower() or hasattr(part, "last_epoch")


def _warn(what: str, again: str, way_out: str) -> None:
    warnings.warn(
        f"{what} is not among the parts of the checkpoint, so that a resumed run would begin {again} again: give it as "
        f"{way_out}",
        RuntimeWarning,
        stacklevel=level_of_the_user(),
    )
