"""Records a model's forward, and computes sums over per-example gradients from it.

While the model given to K-FAC runs forward, the input and output of each layer are recorded. `Capture.observe` then
propagates cotangents from the model's output back to the outputs of the layers. The recomputed forward of activation
checkpointing runs outside the model's own forward, and is therefore not recorded twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakMethod, finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from adabatch.optim.kfac.averages import FactorSums, Sums, WatchedLayer
from adabatch.optim.products import gram


class Noted(NamedTuple):
    """One call of a layer: its name, its input (detached), and its output's edge in the graph."""

    name: str
    input: Tensor
    output: GradientEdge  # not the tensor, which an in-place activation would overwrite


@dataclass(frozen=True)
class Sample:
    """Takes a share of the entries of a tensor along its first dimension, at random but evenly spread.

    Args:
        share: in (0, 1]; with 1 everything is taken, and nothing is drawn.
        generator: draws the entries.
    """

    share: float
    generator: torch.Generator

    def of(self, value: Tensor) -> Tensor:
        """The entries taken. For a mean over all rows they may be examples, positions or both."""
        length = value.shape[0]
        number = math.ceil(self.share * length)
        if number >= length:
            return value
        # One of each of `number` equal stretches. Every k-th would alias with positions that are part of the rows.
        places = torch.arange(number, dtype=torch.float64, device=value.device)
        places += torch.rand(number, dtype=torch.float64, device=value.device, generator=self.generator)
        return value[(places * (length / number)).long().clamp_(max=length - 1)]


# This and the next function are also in adabatch.runtime, which optim/ does not import.
def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that calls a method without keeping its object alive."""
    held = WeakMethod(method)

    def hook(*arguments: object) -> None:
        call = held()
        if call is not None:
            call(*arguments)

    # torch.compile cannot trace a weak reference, and what the hook records is not part of the compiled graph anyway.
    disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


# A second K-FAC on a model (from a notebook cell that is run again) must find the first one, for which torch has no
# registry. The references are weak, so nothing is kept alive.
_WATCHING: WeakKeyDictionary[nn.Module, ref[Capture]] = WeakKeyDictionary()


class Capture:
    """Hooks on a model and its layers. They are removed when this object is dropped, or replaced by a newer one.

    Args:
        model: the module that is called with the inputs; nothing is recorded outside its forward.
        layers: the layers to watch, by module.
        due: returns whether the forward that begins is to be recorded.
        in_rows: keep rows instead of their moments.
        bfloat16: compute the moments from products in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[nn.Module, WatchedLayer],
        *,
        due: Callable[[], bool],
        in_rows: bool = False,
        bfloat16: bool = False,
    ) -> None:
        self._model = model
        self._layers = dict(layers)
        self._kinds = {layer.name: layer.kind for layer in layers.values()}
        self._due = due
        self._in_rows = in_rows
        self._bfloat16 = bfloat16
        self._watching = False
        self._noted: list[Noted] = []
        self._sums = Sums()
        self._replaced = False
        for module in layers:
            older = _WATCHING.get(module)
            if older is not None and (capture := older()) is not None:
                capture.give_way()
            _WATCHING[module] = ref(self)
        # The layers' hooks first: the model may itself be a layer, and its hooks run in this order.
        self._handles = [
            *(module.register_forward_hook(_weakly(self._note)) for module in layers),
            model.register_forward_pre_hook(_weakly(self._begin), prepend=True),
            # Also after an error in the forward: otherwise layers that are called outside of it would be recorded.
            model.register_forward_hook(_weakly(self._end), always_call=True),
        ]
        finalize(self, _remove, self._handles).atexit = False

    def _begin(self, module: nn.Module, args: object) -> None:
        if module is not self._model:  # a deep copy of it (an average of its weights) has the hooks too
            return
        self._noted.clear()
        # Without gradients, as in an evaluation, there is no graph in which to go back.
        self._watching = torch.is_grad_enabled() and self._due()

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self._watching = self._watching and module is not self._model

    def _note(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._watching and output.requires_grad and module in self._layers:
            self._noted.append(Noted(self._layers[module].name, args[0].detach(), get_gradient_edge(output)))

    def give_way(self) -> None:
        """Called when a newer K-FAC takes over these layers."""
        self._replaced = True
        self.remove()

    @property
    def noted(self) -> bool:
        """Whether a forward has been recorded but not observed.

        Raises:
            RuntimeError: if a newer K-FAC has taken over these layers.
        """
        if self._replaced:
            raise RuntimeError(
                "this KFAC was replaced by a newer one on the same model: step and observe with that one"
            )
        return bool(self._noted)

    def observe(self, outputs: Tensor, cotangents: Iterable[Tensor], sample: Sample) -> None:
        """Adds the last forward of the model to the sums of this step.

        Args:
            outputs: the outputs of the model, shape (examples, ...), with their graph, which is kept.
            cotangents: cotangents of ``outputs``, each in their shape.
            sample: which of the layers' inputs and output gradients to take.
        """
        noted, self._noted = self._noted, []
        where = [each.output for each in noted]
        with torch.autocast(outputs.device.type, enabled=False), torch.no_grad():
            for each in noted:
                self._add_input(each.name, sample.of(each.input))
        for cotangent in cotangents:
            # a backward of the outputs alone: the loss's own would give gradients of a mean over the batch, times its
            # scale
            # The graph is kept for the backward of the loss. A layer need not reach these outputs.
            deltas = torch.autograd.grad(
                outputs, where, grad_outputs=cotangent.to(outputs.dtype), retain_graph=True, allow_unused=True
            )
            with torch.autocast(outputs.device.type, enabled=False), torch.no_grad():
                for each, delta in zip(noted, deltas, strict=True):
                    if delta is not None:
                        taken = sample.of(delta)
                        self._add_output(each.name, taken, len(delta) / len(taken))
        self._sums.num_examples += outputs.shape[0]

    def _add_input(self, name: str, value: Tensor) -> None:
        kind = self._kinds[name]
        sums = self._sums.layers.setdefault(name, FactorSums())
        sums.num_rows += kind.num_rows(value)
        rows = kind.input_rows(value) if self._in_rows else None
        if rows is not None:
            sums.input_rows.append(rows)
            return
        moment = kind.input_moment(value, bfloat16=self._bfloat16)
        sums.input_sum = moment if sums.input_sum is None else sums.input_sum.add_(moment)

    def _add_output(self, name: str, delta: Tensor, weight: float) -> None:
        """Adds output gradients that each stand for ``weight`` of them."""
        sums = self._sums.layers[name]
        rows = self._kinds[name].output_rows(delta)
        if self._in_rows:
            sums.output_rows.append(rows * math.sqrt(weight))
            return
        moment = gram(rows, bfloat16=self._bfloat16).mul_(weight)
        sums.output_sum = moment if sums.output_sum is None else sums.output_sum.add_(moment)

    def take(self) -> Sums:
        """Returns the sums since the last call, and resets them."""
        taken, self._sums = self._sums, Sums()
        return taken

    def remove(self) -> None:
        """Removes every hook from the model."""
        _remove(self._handles)
        self._noted.clear()
