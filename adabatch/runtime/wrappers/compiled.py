"""What ``torch.compile`` puts around a model."""

from __future__ import annotations

from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile(model)``, which holds the same parameters; other models are returned unchanged.

    For a compiled ``DistributedDataParallel`` this is the wrapper; ``fully_shard`` marks the model that it gets.
    """
    inner = getattr(model, "_orig_mod", model)  # OptimizedModule, which has no public name in torch
    assert isinstance(inner, nn.Module)
    return inner
