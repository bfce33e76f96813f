"""Chooses the engine by the type of the model."""

from __future__ import annotations

from typing import get_args

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.collectives import collectives_of
from adabatch.runtime.engines.ddp import DDPEngine
from adabatch.runtime.engines.engine import Engine, GradientSync
from adabatch.runtime.engines.fsdp2 import FSDP2Engine
from adabatch.runtime.engines.plain import PlainEngine
from adabatch.runtime.wrappers.backward import PLAIN, Backward, scaled_by
from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.runtime.wrappers.fsdp2 import is_sharded


def engine_for(
    model: nn.Module,
    gradient_sync: GradientSync | None = None,
    scaler: GradScaler | None = None,
    *,
    backward: Backward | None = None,
) -> Engine:
    """The engine of a model: plain, in ``DistributedDataParallel``, or sharded by ``fully_shard`` (FSDP2).

    Args:
        model: as it is trained.
        gradient_sync: reduce gradients at "each" or at the "last" micro-batch; None for the engine's default.
        scaler: the ``GradScaler`` of a run in float16; None for none.
        backward: that of a host, with its own scaling; None for torch's.

    Raises:
        ValueError: if both ``scaler`` and ``backward`` are given, if ``gradient_sync`` is unknown or does not go with
            the engine, if a plain model runs on several processes, or if a sharded model is not sharded over one
            data-parallel mesh, or has sparse gradients.
        TypeError: if ``scaler`` is not a ``GradScaler``.
    """
    if gradient_sync is not None and gradient_sync not in get_args(GradientSync):
        raise ValueError(f"gradient_sync must be one of {', '.join(get_args(GradientSync))}, got {gradient_sync!r}")
    if backward is not None and scaler is not None:
        raise ValueError("the host scales the loss by itself: leave EngineOptions(scaler=) out")
    if backward is None:
        backward = PLAIN if scaler is None else scaled_by(scaler)
    if is_sharded(model):
        # By default in each micro-batch: until it is reduced, every rank holds its whole gradient.
        return FSDP2Engine(model, gradient_sync=gradient_sync or "each", backward=backward)
    if isinstance(uncompiled(model), DistributedDataParallel):
        return DDPEngine(model, gradient_sync=gradient_sync or "last", backward=backward)
    return PlainEngine(model, collectives_of(model), backward)
