"""Micro-batches of weight 0, such as those whose labels are all masked.

Their loss is a mean over no terms, so it may be NaN, and then every gradient of it would be NaN too, even times zero.
But ranks that reduce their gradients together wait for each other, so a backward must run nevertheless. It starts from
the model's outputs, which are finite, with a gradient of exactly zero, and all hooks of the engine run as usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class EmptyParts:
    """Keeps the outputs of the model in the forward of such a micro-batch.

    Args:
        model: as the loop calls it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._outputs: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which the micro-batch runs."""
        # For this micro-batch only: a hook that stayed would keep the outputs, and so the graphs, of all others.
        handle = self._model.register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()
            self._outputs.clear()

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs += [tensor for tensor in _tensors(output) if tensor.requires_grad]

    def zero(self) -> Tensor | None:
        """A loss, shape (), whose gradient is zero at every output; None if there is no such loss.

        There is none if the model was not called, or if its only output is a loss that is not finite, through which a
        zero gradient would become NaN.
        """
        # Models of Hugging Face return a loss among other outputs: a backward through it would give NaN.
        chosen = [tensor for tensor in self._outputs if tensor.ndim] or self._outputs
        if not chosen or not all(tensor.ndim or math.isfinite(float(tensor.detach())) for tensor in chosen):
            return None
        # An output with dimensions may hold NaN: then `tensor * 0` does too, but its gradient is 0 all the same.
        # All outputs, not one: DDP waits for the gradient of every parameter, and each output may reach different ones.
        return sum(((tensor * 0).sum() for tensor in chosen[1:]), start=(chosen[0] * 0).sum())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for branch in tree.values():
            yield from _tensors(branch)
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)
    elif hasattr(tree, "__dataclass_fields__"):
        for name in tree.__dataclass_fields__:
            yield from _tensors(getattr(tree, name))
