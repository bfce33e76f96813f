"""Which engine a model runs on, told by its type."""

from __future__ import annotations

from typing import get_args

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.collectives import collectives_of
from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.engines.backward import PLAIN, scaled_by
from adabatch.runtime.engines.ddp import DDPEngine
from adabatch.runtime.engines.engine import Engine, GradientSync
from adabatch.runtime.engines.fsdp2 import FSDP2Engine
from adabatch.runtime.engines.plain import PlainEngine
from adabatch.runtime.fsdp2 import is_sharded


def engine_for(model: nn.Module, gradient_sync: GradientSync | None = None, scaler: GradScaler | None = None) -> Engine:
    """The engine of a model: plain, in ``DistributedDataParallel``, or sharded by ``fully_shard`` (FSDP2).

    Args:
        model: as it is trained.
        gradient_sync: "each" or "last" micro-batch; None for what suits the engine.
        scaler: of the losses, in float16; None for none.

    Raises:
        ValueError: an unknown ``gradient_sync`` or one that the engine does not go with; a plain model on several
            processes; a sharded model that is not sharded over one data-parallel mesh, or has sparse gradients.
        TypeError: a scaler that is not a ``GradScaler``.
    """
    if gradient_sync is not None and gradient_sync not in get_args(GradientSync):
        raise ValueError(f"gradient_sync must be one of {', '.join(get_args(GradientSync))}, got {gradient_sync!r}")
    backward = PLAIN if scaler is None else scaled_by(scaler)
    if is_sharded(model):
        return FSDP2Engine(model, gradient_sync=gradient_sync or "each", backward=backward)
    if isinstance(uncompiled(model), DistributedDataParallel):
        return DDPEngine(model, gradient_sync=gradient_sync or "last", backward=backward)
    return PlainEngine(model, collectives_of(model), backward)
