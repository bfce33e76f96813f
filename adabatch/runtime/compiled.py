"""What ``torch.compile`` puts around a model."""

from __future__ import annotations

from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile(model)``, which holds the same parameters; any other model itself.

    A ``DistributedDataParallel`` that was compiled is the model inside; ``fully_shard`` marks what it is given.
    """
    inner = getattr(model, "_orig_mod", model)  # OptimizedModule, of which torch has no public name
    assert isinstance(inner, nn.Module)
    return inner
