"""Lightning Fabric: finds the model and the optimizer inside its wrappers.

Fabric's wrappers are recognized by their classes in the modules that define them. If those modules are not loaded, no
object has these classes, so Lightning is not imported here.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FullyShardedDataParallel

from adabatch.runtime.wrappers.backward import Backward, factor_of

_WRAPPERS = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
"""The two packages under which Fabric is published."""


class FabricModel(NamedTuple):
    """A model that was set up by Fabric.

    Args:
        model: what Fabric runs: the module itself, in ``DistributedDataParallel``, or sharded.
        backward: Fabric's own backward, as its precision and strategy make it.
    """

    model: nn.Module
    backward: Backward


def inside_fabric(model: nn.Module) -> FabricModel | None:
    """The model inside the wrapper of ``fabric.setup``; None if Fabric did not set up the model.

    Raises:
        ValueError: if its strategy is FSDP (the first version) or DeepSpeed.
    """
    for wrappers in _loaded():
        if isinstance(model, wrappers._FabricModule):
            inner: nn.Module = model._forward_module
            _check(inner, model._strategy)
            return FabricModel(inner, _backward_of(model, wrappers))
    return None


def without_fabric(optimizer: Any) -> Any:
    """The optimizer inside the wrapper of ``fabric.setup``; other optimizers are returned unchanged."""
    for wrappers in _loaded():
        if isinstance(optimizer, wrappers._FabricOptimizer):
            return optimizer.optimizer
    return optimizer


def _loaded() -> list[ModuleType]:
    # Looked up at each call, because the user may import Lightning after adabatch.
    return [sys.modules[name] for name in _WRAPPERS if name in sys.modules]


def _check(inner: nn.Module, strategy: Any) -> None:
    name = type(strategy).__name__
    if isinstance(inner, FullyShardedDataParallel):
        raise ValueError(
            f"Fabric's {name} shards by FullyShardedDataParallel, whose gradients cannot be measured: use "
            f"ModelParallelStrategy with fully_shard (FSDP2), or DDPStrategy"
        )
    if "DeepSpeed" in name:
        raise ValueError(
            f"Fabric's {name} steps the DeepSpeed engine by itself: use ModelParallelStrategy with fully_shard (FSDP2) "
            f"or DDPStrategy, or deepspeed.initialize with adabatch.integrations.deepspeed.attach instead of Fabric"
        )


def _backward_of(model: Any, wrappers: Any) -> Backward:
    """The backward of ``fabric.backward``, which one strategy restricts to the model's outputs."""
    strategy, inner = model._strategy, model._forward_module
    scaler: GradScaler | None = getattr(strategy.precision, "scaler", None)

    def run(loss: Tensor) -> None:
        wrappers._in_fabric_backward = True  # the outputs of the model refuse any other backward
        try:
            strategy.backward(loss, inner)
        finally:
            wrappers._in_fabric_backward = False

    return Backward(run, None if scaler is None else factor_of(scaler))
