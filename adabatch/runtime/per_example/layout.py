"""Which inputs have an example a row: tried once, with one example less, before the first forward that is measured.

A module that gets as many rows as there are examples may have got something else: positions of a sequence that is as
long as the micro-batch is large, or the same with times first. Shapes alone do not tell. So the model runs once more,
without gradients, on all examples but the last; what then still has as many rows as before is no examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.per_example.replay import map_tensors, tensors_of
from adabatch.runtime.random_state import random_state, restore_random_state


def run_with_one_less(model: nn.Module, args: Any, kwargs: Any, num_examples: int) -> bool:
    """Runs the model on all examples but the last one; whether it could.

    Random numbers and buffers are as they were afterwards, and ``DistributedDataParallel`` learns nothing of it.

    Args:
        model: as the loop calls it, not sharded.
        args: of the forward that is about to be run.
        kwargs: the same.
        num_examples: rows of its tensors that hold examples; at least 2.
    """
    inner = uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        inner = inner.module
    rows = [tensor for tensor in tensors_of((args, kwargs)) if tensor.dim() and tensor.shape[0] == num_examples]
    # All that have as many rows, or the first alone, where another one is a mask that merely looks like it.
    for chosen in (rows, rows[:1]):
        taken = {id(tensor) for tensor in chosen}

        def shorter(tensor: Tensor, taken: set[int] = taken) -> Tensor:
            return tensor[:-1] if id(tensor) in taken else tensor

        fewer: Any = map_tensors(shorter, (args, kwargs))
        try:
            with torch.no_grad(), _without_a_trace(inner), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Past the hooks at the model itself, which may take it for the forward of the step.
                inner.forward(*fewer[0], **fewer[1])
            return bool(chosen)
        except Exception:  # whatever a model says to inputs that do not fit together
            continue
    return False


@contextmanager
def _without_a_trace(model: nn.Module) -> Iterator[None]:
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
