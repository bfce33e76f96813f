"""Finds out, before the first measured forward, which inputs have one example per row.

If a module's input has as many rows as there are examples, the rows may still be something else, such as the positions
of a sequence that is as long as the micro-batch is large. Shapes alone cannot tell. So the model runs once, without
gradients, on all examples but the last. Inputs that then have as many rows as before do not have examples as rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.per_example.replay import map_tensors, tensors_of
from adabatch.runtime.random_state import random_state, restore_random_state
from adabatch.runtime.wrappers.compiled import uncompiled


def run_with_one_less(model: nn.Module, args: Any, kwargs: Any, num_examples: int) -> bool:
    """Runs the model on all examples but the last one, and returns whether it could.

    Restores random numbers and buffers, and bypasses ``DistributedDataParallel``.

    Args:
        model: the model that the loop calls, not sharded.
        args: arguments of the forward that is about to run.
        kwargs: keyword arguments of that forward.
        num_examples: examples in the micro-batch; at least 2.
    """
    inner = uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        inner = inner.module
    rows = [tensor for tensor in tensors_of((args, kwargs)) if tensor.dim() and tensor.shape[0] == num_examples]
    # First with all tensors that have as many rows shortened; then with the first one only, in case another is a mask
    # that has this size by chance.
    for chosen in (rows, rows[:1]):
        taken = {id(tensor) for tensor in chosen}

        def shorter(tensor: Tensor, taken: set[int] = taken) -> Tensor:
            return tensor[:-1] if id(tensor) in taken else tensor

        fewer: Any = map_tensors(shorter, (args, kwargs))
        try:
            with torch.no_grad(), _without_autocast_cache(), _with_state_restored(inner), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Bypasses the hooks on the model itself, which might take this for the forward of the step.
                inner.forward(*fewer[0], **fewer[1])
            return bool(chosen)
        except Exception:  # a model may raise anything on inputs that do not fit together
            continue
    return False


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast keeps no weight that was cast without a gradient; torch 2.6 would use it in the step's own forward."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


@contextmanager
def _with_state_restored(model: nn.Module) -> Iterator[None]:
    device = next(model.parameters()).device
    numbers = random_state(device)
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        restore_random_state(numbers.unsqueeze(0), 0, device)
        for module, name, buffer, value in held:
            if module.get_buffer(name) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                buffer.copy_(value)
