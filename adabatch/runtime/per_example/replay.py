"""Per-example gradients of a module without a rule: the module is called again under ``torch.func.vmap``.

The replay differentiates one module, not the model. Its inputs and the gradients at its outputs are those of the real
step, so the loss is not needed and nothing else runs again. It processes a few examples at a time and never holds all
gradients at once. A module that draws random numbers is refused, because its masks were drawn for the whole batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adabatch.runtime.per_example.contributions import by_row, chunks, wide


def map_tensors(function: Callable[[Tensor], object], tree: object) -> object:
    """The tree of tuples, lists and dicts with ``function`` applied to its tensors, in order."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple | list):
        branches = [map_tensors(function, branch) for branch in tree]
        kind: Any = type(tree)
        # A named tuple takes its fields as arguments.
        return kind(branches) if kind in (tuple, list) else kind(*branches)
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
    """The autocast state of a forward, set again for its replay."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """The present settings."""
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def again(self) -> torch.autocast:
        """A context in which these settings are active."""
        # Without its cache, as in `layout`: a replay has no gradients.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class Replay:
    """One call of a module, and the gradients at its outputs.

    Args:
        module: the module.
        names: the names of its trainable parameters in the module.
        arguments: (args, kwargs) of the call. A tensor whose first dimension is ``num_examples`` has one example per
            row; any other tensor is the same for all examples.
        inputs: the tensors of ``arguments``, in order.
        grads: gradient at each output tensor of the call, in order; None for outputs without one.
        num_examples: examples in the micro-batch.
        autocast: the autocast state during the call.
        shared: positions of inputs that are the same for all examples whatever their first dimension, as the trial of
            the layout found; empty without a trial.
    """

    module: nn.Module
    names: tuple[str, ...]
    arguments: object
    inputs: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    num_examples: int
    autocast: Autocast
    shared: frozenset[int] = frozenset()

    @property
    def dense_is_smaller(self) -> bool:
        """Whether the gradients themselves hold at most as many numbers as the replay."""
        return self._parameter_numbers <= self._signal_numbers

    @property
    def _signal_numbers(self) -> int:
        """How many numbers the inputs and output gradients of one example hold."""
        held = sum(tensor.numel() for tensor in (*self.inputs, *self.grads) if tensor is not None)
        return held // self.num_examples

    @property
    def _parameter_numbers(self) -> int:
        return sum(self.module.get_parameter(name).numel() for name in self.names)

    def gradients(self) -> Iterator[dict[str, Tensor]]:
        """Gradients of successive runs of examples: parameter name -> (length of the run, *parameter.shape)."""
        inputs = [self._by_example(position, tensor) for position, tensor in enumerate(self.inputs)]
        per_example = [tensor for tensor in inputs if tensor is not None]
        grads = [
            _by_example(tensor, example_dim(self.module, position))
            for position, tensor in enumerate(self.grads)
            if tensor is not None
        ]
        device = grads[0].device
        for part in chunks(self.num_examples, self._parameter_numbers + self._signal_numbers, device):
            yield self._run([tensor[part] for tensor in per_example], [grad[part] for grad in grads])

    def _run(self, inputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
        # With gradients enabled, as in the forward: otherwise an LSTM takes a kernel that vmap cannot batch. The math
        # backend, because the fused attention kernels have no batching rule.
        with (
            torch.enable_grad(),
            self.autocast.again(),
            sdpa_kernel(SDPBackend.MATH),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "There is a performance drop because we have not yet")
            try:
                found: dict[str, Tensor] = torch.func.vmap(self._gradient)(inputs, grads)
            except (RuntimeError, ValueError) as error:
                kind = type(self.module).__name__
                raise RuntimeError(
                    f"{kind} has no rule for per-example gradients, and torch.func.vmap cannot run it one "
                    f"example at a time ({error}). Pass rules={{{kind}: ...}}, write it with layers that "
                    "have a rule, or use the norm test from micro-batches"
                ) from error
        return found

    def dense(self) -> dict[str, Tensor]:
        """All gradients at once: parameter name -> (num_examples, *parameter.shape)."""
        runs = list(self.gradients())
        return {name: torch.cat([run[name] for run in runs]) for name in self.names}

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        """``<g_i, direction>`` over the module's parameters, shape (num_examples,)."""
        runs = [
            torch.stack([by_row(wide(run[name]) * wide(direction[name])).sum(1) for name in direction])
            for run in self.gradients()
        ]
        return torch.cat([run.sum(0) for run in runs])

    def _by_example(self, position: int, tensor: Tensor) -> Tensor | None:
        """The input with the examples as an additional first dimension; None if it is shared by all examples."""
        dim = example_dim(self.module, position)
        if position in self.shared:
            return None
        if tensor.dim() > dim and tensor.shape[dim] == self.num_examples:
            return _by_example(tensor, dim)
        module = self.module
        if isinstance(module, nn.MultiheadAttention) and tensor.dim() == 3:  # attention masks, one per head
            return tensor.reshape(self.num_examples, module.num_heads, *tensor.shape[1:])
        return None

    def _gradient(self, inputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
        """The gradient of one example, from tensors that hold only this example."""
        own = iter(inputs)
        # vmap hands over the rows of this example; inputs that all examples share are taken as they are.
        leaves = iter(
            [
                shared if self._by_example(position, shared) is None else next(own)
                for position, shared in enumerate(self.inputs)
            ]
        )
        call: Any = map_tensors(lambda _: next(leaves), self.arguments)

        def outputs(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
            leaves = tensors_of(torch.func.functional_call(self.module, parameters, *call))
            return tuple(leaf for leaf, grad in zip(leaves, self.grads, strict=True) if grad is not None)

        # Not the module's own: vjp differentiates with respect to these, and accumulates nothing into their .grad.
        parameters = {name: self.module.get_parameter(name).detach() for name in self.names}
        pull_back = torch.func.vjp(outputs, parameters)[1]
        gradient: dict[str, Tensor] = pull_back(tuple(grads))[0]
        return gradient


def example_dim(module: nn.Module, position: int) -> int:
    """The dimension of the examples in an input or output at ``position``: 1 for recurrent states, otherwise 0."""
    return 1 if isinstance(module, nn.RNNBase) and position > 0 else 0


def with_states(module: nn.Module, args: tuple[Any, ...], num_examples: int) -> tuple[Any, ...]:
    """The arguments, with the zero states that a recurrent module would otherwise create itself."""
    if not isinstance(module, nn.RNNBase) or len(args) != 1 or not isinstance(args[0], Tensor):
        return args
    layers = module.num_layers * (2 if module.bidirectional else 1)
    hidden = args[0].new_zeros(layers, num_examples, module.proj_size or module.hidden_size)
    if not isinstance(module, nn.LSTM):
        return (*args, hidden)
    return (*args, (hidden, args[0].new_zeros(layers, num_examples, module.hidden_size)))


def _by_example(tensor: Tensor, dim: int) -> Tensor:
    """Moves the examples to the first dimension and leaves a dimension of 1 in their place, as for a call with one."""
    return tensor.movedim(dim, 0).unsqueeze(dim + 1)
