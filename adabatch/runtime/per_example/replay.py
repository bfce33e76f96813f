"""Per-example gradients of a module without a rule: its call once more under ``torch.func.vmap``.

The replay differentiates one module, not the model: its inputs and the gradients at its outputs are those of
the real step, so the loss is not needed and nothing else runs again. It works through chunks of examples and
never holds all gradients at a time. A module that draws random numbers cannot be replayed, because its masks
were drawn for the whole batch; it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adabatch.runtime.per_example.contributions import chunks, wide


def map_tensors(function: Callable[[Tensor], object], tree: object) -> object:
    """The tree of tuples, lists and dicts with ``function`` applied to its tensors, in order."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, branch) for branch in tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, branch) for key, branch in tree.items()}
    return tree


def tensors_of(tree: object) -> list[Tensor]:
    """The tensors of a tree of tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    return [leaf for branch in branches for leaf in tensors_of(branch)]


@dataclass(frozen=True)
class Autocast:
    """The autocast state of a forward, to be put on again for its replay."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        return cls(
            device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        )

    def again(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


@dataclass(frozen=True)
class Replay:
    """One call of a module, and the gradients at its outputs.

    Args:
        module: the module.
        names: its trainable parameters, as the module names them.
        arguments: (args, kwargs) of the call; a tensor whose first dimension is ``num_examples`` has an
            example a row, any other is the same for all.
        inputs: the tensors of ``arguments``, in order.
        grads: gradient at each output tensor of the call, in order; None where there is none.
        num_examples: examples in the micro-batch.
        autocast: state during the call.
    """

    module: nn.Module
    names: tuple[str, ...]
    arguments: object
    inputs: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    num_examples: int
    autocast: Autocast

    @property
    def dense_is_smaller(self) -> bool:
        """Whether the gradients themselves are fewer numbers than what the replay holds."""
        held = sum(tensor.numel() for tensor in (*self.inputs, *self.grads) if tensor is not None)
        return self.num_examples * self._parameter_numbers <= held

    @property
    def _parameter_numbers(self) -> int:
        return sum(self.module.get_parameter(name).numel() for name in self.names)

    def gradients(self) -> Iterator[dict[str, Tensor]]:
        """The gradients of runs of examples: parameter name -> (length of the run, *parameter.shape)."""
        inputs = [self._by_example(tensor) for tensor in self.inputs]
        grads = [grad for grad in self.grads if grad is not None]
        per_example = [tensor for tensor in inputs if tensor is not None]
        transform = torch.func.vmap(self._gradient)
        for part in chunks(self.num_examples, self._parameter_numbers):
            try:
                with torch.enable_grad(), self.autocast.again(), sdpa_kernel(SDPBackend.MATH):
                    yield transform([tensor[part] for tensor in per_example], [grad[part] for grad in grads])
            except (RuntimeError, ValueError) as error:
                raise RuntimeError(
                    f"{type(self.module).__name__} has no rule for per-example gradients, and "
                    f"torch.func.vmap cannot run it one example at a time ({error}). Pass "
                    f"rules={{{type(self.module).__name__}: ...}}, write it with layers that have a rule, or "
                    "use the norm test from micro-batches"
                ) from error

    def dense(self) -> dict[str, Tensor]:
        """All gradients at once: parameter name -> (num_examples, *parameter.shape)."""
        runs = list(self.gradients())
        return {name: torch.cat([run[name] for run in runs]) for name in self.names}

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        """``<g_i, direction>`` over the module's parameters, shape (num_examples,)."""
        runs = [
            torch.stack([(wide(run[name]) * wide(direction[name])).flatten(1).sum(1) for name in direction])
            for run in self.gradients()
        ]
        return torch.cat([run.sum(0) for run in runs])

    def _by_example(self, tensor: Tensor) -> Tensor | None:
        """The tensor with its examples along the first dimension, one kept below; None where it is shared."""
        if tensor.dim() == 0:
            return None
        if tensor.shape[0] == self.num_examples:
            return tensor.unsqueeze(1)
        module = self.module
        if (  # attention masks of shape (num_examples x heads, ...)
            isinstance(module, nn.MultiheadAttention)
            and tensor.dim() == 3
            and tensor.shape[0] == self.num_examples * module.num_heads
        ):
            return tensor.reshape(self.num_examples, module.num_heads, *tensor.shape[1:])
        return None

    def _gradient(self, inputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
        """The gradient of one example, whose first dimension is 1."""
        own = iter(inputs)
        leaves = iter(
            [shared if self._by_example(shared) is None else next(own) for shared in self.inputs]
        )
        call: Any = map_tensors(lambda _: next(leaves), self.arguments)

        def outputs(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
            leaves = tensors_of(torch.func.functional_call(self.module, parameters, *call))
            return tuple(leaf for leaf, grad in zip(leaves, self.grads, strict=True) if grad is not None)

        parameters = {name: self.module.get_parameter(name).detach() for name in self.names}
        pull_back = torch.func.vjp(outputs, parameters)[1]
        gradient: dict[str, Tensor] = pull_back(tuple(grad.unsqueeze(0) for grad in grads))[0]
        return gradient
