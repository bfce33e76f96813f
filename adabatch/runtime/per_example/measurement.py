"""The hooks of one measured micro-batch, which combine the inputs of the forward with the gradients of the backward.

They use two features of autograd. Inputs are kept with ``save_for_backward``, so activation checkpointing and
offloading treat them like a layer's own: a checkpointed input is recomputed, not stored. And the hook that runs once a
parameter's gradient is complete shows that all calls that share the parameter have been seen, so contributions to tied
weights are summed before the norm without counting calls. Here, the gradient of an example is that of its share of the
loss, as the backward delivers it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adabatch.runtime.per_example.contributions import (
    Contribution,
    Dense,
    combined_squares,
    coordinate_squares,
    squared_sums,
    wide,
)
from adabatch.runtime.per_example.fused import FusedCall, Summed, fused_call, summed, with_sum_of_examples
from adabatch.runtime.per_example.layout import run_with_one_less
from adabatch.runtime.per_example.replay import (
    Autocast,
    Replay,
    example_dim,
    map_tensors,
    tensors_of,
    with_states,
)
from adabatch.runtime.per_example.rules import RULES
from adabatch.runtime.per_example.sites import Site
from adabatch.runtime.wrappers.fsdp2 import class_of, is_sharded

# If a parameter is used outside the module that owns it, the gradients of the examples do not add up to its own. These
# are the allowed differences, relative to its squared norm and to the mean absolute product; rounding in bfloat16 stays
# below them.
_TOLERANCE_SQUARE, _TOLERANCE_SPREAD = 0.05, 0.01

# Where the true gradient is zero (biases of attention keys, biases before an instance norm), both sums consist of
# rounding errors only and may differ by any ratio. They are compared with the sums of absolute values instead: allowed
# is _ROUNDING of those, or _ROUNDING_STEPS times the precision of the dtype if that is coarser. Differences below
# _NEGLIGIBLE of the whole gradient are ignored.
_ROUNDING, _ROUNDING_STEPS, _NEGLIGIBLE = 1e-4, 2.0, 1e-7


class Held(Protocol):
    """What is kept from the backward to compute inner products."""

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        """``<g_i, direction>`` over the parameters that it covers, shape (num_examples,)."""


@dataclass(frozen=True)
class _HeldContribution:
    name: str
    contribution: Contribution

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.contribution.products(direction[self.name])


@dataclass(frozen=True)
class _HeldReplay:
    names: Mapping[str, str]  # a parameter's name in the module -> its name in the model
    replay: Replay

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.replay.products({own: direction[name] for own, name in self.names.items()})


class _Keep(torch.autograd.Function):
    """A graph node that saves tensors as autograd does, under the ``saved_tensors_hooks`` that are active."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        # The output is needed for its graph node only. There is no backward(): nobody differentiates it.
        return torch.empty_like(anchor)


class _SavedTensors:
    """Tensors kept for one backward, freed when they are taken."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Without an input that requires a gradient, autograd would make no node.
        anchor = torch.empty(0, requires_grad=True)
        # The output, and not only its node: before torch 2.8 or so, the node alone did not keep what it has saved.
        self._kept: Tensor | None
        self._kept = _Keep.apply(anchor, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]

    def take(self) -> tuple[Tensor, ...]:
        if self._kept is None:
            raise RuntimeError("two backwards through one measured forward: measure a forward that has one")
        node: Any = self._kept.grad_fn
        tensors: tuple[Tensor, ...] = node.saved_tensors
        self._kept = None
        return tensors


class Measurement:
    """The hooks of one micro-batch, and what they have measured.

    Args:
        model: the model.
        sites: the modules that account for its parameters.
        num_examples: examples in the micro-batch; None to take it from the model's first argument.
        hold: keep what inner products need.
        check: compare the sum of the examples' gradients with each parameter's gradient, and find out which inputs have
            one example per row.
        examples_first: the user states that all inputs have, if this cannot be found out.
        coordinates: also sum the squares of each coordinate.
        fused: form weight gradients as sums of the examples' gradients, where these are formed.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        num_examples: int | None,
        *,
        hold: bool,
        check: bool,
        coordinates: bool = False,
        examples_first: bool = False,
        fused: bool = False,
    ) -> None:
        self.squares: dict[str, Tensor] = {}
        self.coordinates: dict[str, Tensor] | None = {} if coordinates else None
        self.held: list[Held] | None = [] if hold else None
        self.parameters: dict[str, nn.Parameter] = {}
        self.num_examples = num_examples
        self._is_given = num_examples is not None
        self._model = model
        self._examples_first = examples_first
        self._rows: dict[Site, set[int]] | None = None  # only during the trial of the layout
        self._is_tried = not check
        self._is_sure = not check or examples_first
        self._shared_inputs: dict[Site, frozenset[int]] = {}
        self._magnitudes: dict[str, list[Contribution]] = {}
        self._rounding: dict[str, float] = {}
        self._pending: dict[str, list[Contribution]] = {}  # until the parameter's gradient is complete
        self._completed: set[str] = set()
        self._checks: dict[str, Tensor] | None = {} if check else None
        self._sums: dict[str, Tensor] = {}
        self._keys: dict[Site, dict[str, str]] = {}  # a site's own parameter names -> ours
        self._shared: set[str] = set()
        self._num_calls: dict[Site, int] = {}
        self._is_replaying = False
        # While it is checked that the modules account for their parameters' gradients, autograd's own are formed too: a
        # sum of the examples' gradients would agree with itself. They are then replaced, so that a micro-batch has the
        # same gradients whether it is the one that is checked or not.
        self._is_fused = fused and (not check or is_sharded(model))
        self._replaces = fused and not self._is_fused
        self._num_fusible: Counter[str] = Counter()  # calls of each parameter that would be fused without the check
        self._open: dict[Site, FusedCall] = {}  # forwards of fused layers that are running
        self._handles: list[Any] = []
        self._contexts = ExitStack()
        if "torch._dynamo" in sys.modules:  # compiled code does not run hooks that came later
            self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
        # Before the modules' own hooks run: they need the number of examples.
        self._handles.append(model.register_forward_pre_hook(self._count_examples, with_kwargs=True))
        self._set_hooks(sites)

    def _set_hooks(self, sites: Sequence[Site]) -> None:
        names: dict[nn.Parameter, str] = {}
        for site in sites:
            keys: dict[str, str] = {}
            for own in site.names:
                parameter = site.module.get_parameter(own)
                if not parameter.requires_grad:
                    continue
                # A tied weight is one parameter: it has one hook, and one name, at the first of its modules.
                if parameter in names:
                    self._shared.add(names[parameter])
                else:
                    key = names[parameter] = site.key(own)
                    self.parameters[key] = parameter
                    hook = parameter.register_hook(partial(self._on_parameter, key))  # type: ignore[no-untyped-call]
                    self._handles.append(hook)
                keys[own] = names[parameter]
            if keys:
                self._keys[site] = keys
                if self._is_fused and site.rule is not None:
                    self._handles += [
                        site.module.register_forward_pre_hook(partial(self._before_fused, site), with_kwargs=True),
                        # Also after a forward that raised, as the parameters must ask for gradients again.
                        site.module.register_forward_hook(
                            partial(self._after_fused, site), with_kwargs=True, prepend=True, always_call=True
                        ),
                    ]
                    continue
                forward = partial(self._on_replayed if site.rule is None else self._on_ruled, site)
                # Before the user's own hooks, which may put another output in the place of the module's.
                self._handles.append(site.module.register_forward_hook(forward, with_kwargs=True, prepend=True))

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for call in self._open.values():  # only if an interrupt ended a forward
            call.close()
        self._open.clear()
        self._contexts.close()

    @torch.no_grad()
    def settle(self) -> None:
        """Computes what is left after the backward; raises if the modules do not account for a gradient."""
        # Left are parameters whose hook did not run, such as sharded ones, whose gradient FSDP2 sets outside autograd.
        # The list is copied, because _settle() takes entries out.
        for name in list(self._pending):
            self._settle(name)
        # Parameters that got a gradient, although no module that owns them was called.
        wrong = self._completed - self.squares.keys()
        if self._checks:
            numbers = torch.stack(list(self._checks.values())).tolist()  # host sync, once in a run
            whole = sum(square for _, _, square, _ in numbers)
            for name, (total, spread, square, rounding) in zip(self._checks, numbers, strict=True):
                allowed = _TOLERANCE_SQUARE * square + _TOLERANCE_SPREAD * spread + rounding + _NEGLIGIBLE * whole
                if abs(total - square) > allowed:
                    wrong.add(name)
        if wrong:
            raise RuntimeError(
                f"the gradient of {', '.join(sorted(wrong))} is not what the modules that own it account "
                "for: it is used outside of their forward, by a function or by another module. Call the "
                "module instead, or use the norm test from micro-batches"
            )
        if not self.squares:
            raise RuntimeError(
                "no backward reached the model: call start() before the forward and finish() after the backward"
            )

    # Forward: keep the inputs, and put a hook on the outputs.

    def _count_examples(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A forward without gradients (of a teacher, or for a metric) is not measured.
        if self._is_replaying or not torch.is_grad_enabled():
            return
        if not self._is_given:
            sizes = (tensor.shape[0] for tensor in tensors_of((args, kwargs)) if tensor.dim() > 0)
            self.num_examples = next(sizes, self.num_examples)
        if not self._is_tried and (self.num_examples or 0) > 1:
            self._is_tried = True
            self._try_layout(args, kwargs)

    def _try_layout(self, args: Any, kwargs: Any) -> None:
        """Finds out which inputs have one example per row; raises if the rows of an input are something else."""
        num_examples = self.num_examples
        assert num_examples is not None
        if is_sharded(self._model):  # its forward waits for other ranks, whose micro-batch may need no trial
            return
        self._rows = {}
        try:
            # If the model cannot run on one example less, nothing is known; _refuse_positions() then goes by the
            # shapes.
            self._is_sure |= run_with_one_less(self._model, args, kwargs, num_examples)
        finally:
            # Also after an error: otherwise all later forwards would be taken for the trial.
            rows, self._rows = self._rows, None
        if self._examples_first:
            return
        for site, seen in rows.items():
            if self._is_sure and num_examples in seen:
                raise ValueError(
                    f"{site} gets {num_examples} rows for {num_examples - 1} examples too, so they are not examples "
                    f"but positions, times or the like: give it the examples along the first dimension, and positions "
                    f"that all examples share the shape (1, num_positions), or use the norm test from micro-batches"
                )

    def _note_rows(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        assert self._rows is not None
        assert self.num_examples is not None
        if site.rule is not None:
            tensors = [next(iter((*args, *kwargs.values())))]
        else:
            tensors = tensors_of(output)
            inputs = tensors_of((with_states(module, args, self.num_examples - 1), kwargs))
            self._shared_inputs[site] = frozenset(
                position
                for position, tensor in enumerate(inputs)
                if tensor.dim() > (dim := example_dim(module, position)) and tensor.shape[dim] == self.num_examples
            )
        for position, tensor in enumerate(tensors):
            dim = 0 if site.rule is not None else example_dim(module, position)
            if tensor.dim() > dim:
                self._rows.setdefault(site, set()).add(tensor.shape[dim])

    def _examples_for(self, site: Site) -> int:
        if self.num_examples is None:
            raise ValueError(
                f"{site} ran before the model was called with a tensor, so the number of examples is not "
                "known: pass start(num_examples=...)"
            )
        return self.num_examples

    def _before_fused(self, site: Site, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_replaying:
            call = fused_call(site, tuple(self._keys[site]), args, kwargs)
            if call is not None:
                call.open()
                self._open[site] = call

    def _after_fused(
        self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None
    ) -> Tensor | None:
        call = self._open.pop(site, None)
        if call is not None:
            call.close()
        # The forward raised, or was stopped once all was recomputed that a checkpoint needed.
        if output is None:
            return None
        return self._on_ruled(site, module, args, kwargs, output, call)

    def _on_ruled(
        self,
        site: Site,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Tensor,
        call: FusedCall | None = None,
    ) -> Tensor | None:
        if self._rows is not None:
            self._note_rows(site, module, args, kwargs, output)
        if self._is_replaying or not (output.requires_grad or call is not None):
            return None
        assert site.rule is not None
        inputs: Tensor = next(iter((*args, *kwargs.values())))
        num_examples = self._examples_for(site)
        if inputs.dim() <= site.rule.item_dims(module) or inputs.shape[0] not in (1, num_examples):
            raise ValueError(
                f"{site} got an input of shape {tuple(inputs.shape)} in a micro-batch of {num_examples} "
                f"examples: the first dimension must be the examples, or 1 if all examples share the input"
            )
        if not self._is_sure:
            _refuse_positions(site, inputs, num_examples)
        widened = None
        if inputs.shape[0] != num_examples:
            # The module ran once for all examples; expanded, its output has a gradient for each of them.
            widened = output = output.expand(num_examples, *output.shape[1:])
            inputs = inputs.expand(num_examples, *inputs.shape[1:])
        if call is not None:
            on_grad = partial(self._on_fused_grad, site, call.parameters, num_examples)
            return with_sum_of_examples(output, _as_computed(inputs, output), call, on_grad)
        kept = None
        # A layer of which only the bias trains keeps no input.
        if not self._keys[site].keys() <= site.rule.inputless:
            kept = _SavedTensors([_as_computed(inputs, output)])
        is_fusible = self._replaces and fused_call(site, tuple(self._keys[site]), args, kwargs) is not None
        backward = partial(self._on_ruled_grad, site, kept, num_examples, is_fusible)
        # On the output and not on the module: a backward hook of a module would put nodes of its own into the graph.
        self._handles.append(output.register_hook(backward))  # type: ignore[no-untyped-call]
        return widened

    def _on_replayed(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        if self._rows is not None:
            self._note_rows(site, module, args, kwargs, output)
        leaves = tensors_of(output)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if self._is_replaying or not wanted:
            return
        num_examples = self._examples_for(site)
        for position, leaf in enumerate(leaves):
            dim = example_dim(module, position)
            if leaf.requires_grad and (leaf.dim() <= dim or leaf.shape[dim] != num_examples):
                raise ValueError(
                    f"{site} gave an output of shape {tuple(leaf.shape)} in a micro-batch of {num_examples} "
                    "examples: the first dimension must be the examples"
                )
        # Counted in the forward, because the backward of the first call must know whether others follow.
        self._num_calls[site] = self._num_calls.get(site, 0) + 1
        call = (with_states(module, args, num_examples), kwargs)
        backward = partial(
            self._on_replayed_grads,
            site,
            # The structure of the call without its tensors, which autograd holds (_SavedTensors).
            map_tensors(lambda _: torch.empty(0), call),
            _SavedTensors(tensors_of(call)),
            [leaf.requires_grad for leaf in leaves],
            Autocast.now(wanted[0].device.type),
            num_examples,
        )
        self._handles.append(torch.autograd.graph.register_multi_grad_hook(wanted, backward))

    # Backward: combine the gradients at the outputs with the inputs.

    def _check_number(self, site: Site, num_examples: int) -> None:
        """Checks that all forwards with gradients have the same number of examples."""
        if num_examples != self.num_examples:
            raise ValueError(
                f"one backward of {site} goes through forwards of {num_examples} and of {self.num_examples} examples, "
                f"which cannot be told apart: call the model with the whole micro-batch each time, or use the norm "
                f"test from micro-batches"
            )

    def _on_ruled_grad(
        self, site: Site, kept: _SavedTensors | None, num_examples: int, is_fusible: bool, grad: Tensor
    ) -> None:
        assert site.rule is not None
        self._check_number(site, num_examples)
        inputs = grad.new_empty(0) if kept is None else kept.take()[0]
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for own, contribution in site.rule.contributions(site.module, inputs, grad):
                self._pending.setdefault(self._keys[site][own], []).append(contribution)
                self._num_fusible[self._keys[site][own]] += is_fusible
            # Only for our own rules: a user's rule may not be a sum of products, so absolute values need not bound it.
            if self._checks is not None and site.rule is RULES.get(class_of(site.module)):
                self._note_magnitudes(site, inputs, grad)

    def _on_fused_grad(
        self, site: Site, parameters: Mapping[str, nn.Parameter], num_examples: int, inputs: Tensor, grad: Tensor
    ) -> list[Tensor]:
        assert site.rule is not None
        self._check_number(site, num_examples)
        totals: dict[str, Tensor] = {}
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for own, contribution in site.rule.contributions(site.module, inputs, grad):
                one, totals[own] = self._summed(contribution, parameters[own])
                self._pending.setdefault(self._keys[site][own], []).append(one)
        return [totals[own] for own in parameters]

    def _summed(self, contribution: Contribution, parameter: nn.Parameter) -> tuple[Summed, Tensor]:
        return summed(contribution, parameter, hold=self.held is not None, coordinates=self.coordinates is not None)

    def _note_magnitudes(self, site: Site, inputs: Tensor, grad: Tensor) -> None:
        """Notes the contributions of absolute values: what would be summed if nothing cancelled."""
        assert site.rule is not None
        coarse = _ROUNDING_STEPS * torch.finfo(grad.dtype).eps
        for own, contribution in site.rule.contributions(site.module, inputs.abs(), grad.abs()):
            name = self._keys[site][own]
            self._magnitudes.setdefault(name, []).append(contribution)
            self._rounding[name] = max(_ROUNDING, coarse, self._rounding.get(name, 0.0))

    def _on_replayed_grads(
        self,
        site: Site,
        arguments: object,
        kept: _SavedTensors,
        has_grad: Sequence[bool],
        autocast: Autocast,
        num_examples: int,
        received: Sequence[Tensor | None],
    ) -> None:
        self._check_number(site, num_examples)
        keys = self._keys[site]
        grads = iter(received)
        outputs = [next(grads) if has else None for has in has_grad]
        shared = self._shared_inputs.get(site, frozenset())
        replay = Replay(site.module, tuple(keys), arguments, kept.take(), outputs, num_examples, autocast, shared)
        is_alone = self._num_calls[site] == 1 and self._shared.isdisjoint(keys.values())
        self._is_replaying = True  # the module's children run again, and their hooks must ignore it
        try:
            with torch.no_grad(), torch.autocast(autocast.device_type, enabled=False):
                # The norm of a sum needs all its terms. Only if no other call shares the parameters can the gradients
                # be dropped run by run; otherwise they are kept until the parameter's gradient is complete.
                if is_alone and (self.held is None or not replay.dense_is_smaller):
                    self._settle_replay(keys, replay)
                else:
                    for own, values in replay.dense().items():
                        self._pending.setdefault(keys[own], []).append(Dense(values))
        finally:
            self._is_replaying = False

    def _settle_replay(self, keys: Mapping[str, str], replay: Replay) -> None:
        """Computes the norms for a module whose parameters no other call shares, a few examples at a time."""
        runs: list[dict[str, Tensor]] = []
        for run in replay.gradients():
            runs.append({own: squared_sums(values) for own, values in run.items()})
            if self.coordinates is not None:
                for own, values in run.items():
                    squares = wide(values).square().sum(0)
                    self.coordinates[keys[own]] = squares + self.coordinates.get(keys[own], 0)
            if self._checks is not None:
                for own, values in run.items():
                    self._sums[keys[own]] = values.sum(0) + self._sums.get(keys[own], 0)
        for own, key in keys.items():
            self._put(key, torch.cat([run[own] for run in runs]))
        if self.held is not None:
            self.held.append(_HeldReplay(keys, replay))

    def _on_parameter(self, name: str, grad: Tensor) -> Tensor | None:
        """Called when the parameter's gradient is complete, so every call that shares it has been seen.

        Returns:
            The gradient in the place of this one; None to keep it.
        """
        self._completed.add(name)
        total = None
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if self._checks is not None:
                self._checks[name] = self._compare(name, grad.to_dense() if grad.is_sparse else grad)
            if self._replaces and self._num_fusible[name] == len(self._pending.get(name, ())) > 0:
                total = self._sum_of_examples(name)
            if name in self._pending:
                self._settle(name)
        return total

    def _sum_of_examples(self, name: str) -> Tensor:
        """The gradient that fused calls would have given, added as autograd adds those of several calls."""
        pairs = [self._summed(one, self.parameters[name]) for one in self._pending[name]]
        self._pending[name] = [one for one, _ in pairs]
        total = pairs[0][1]
        for _, other in pairs[1:]:
            total = total + other
        return total

    def _compare(self, name: str, grad: Tensor) -> Tensor:
        """Sum and absolute sum of the examples' inner products with the gradient, the sum's true value, and the
        rounding error to allow."""
        square = wide(grad).square().sum()
        if name in self._sums:
            total = (wide(self._sums.pop(name)) * wide(grad)).sum()
            return torch.stack([total, total.abs(), square, square * 0])
        products = torch.stack([one.products(grad) for one in self._pending.get(name, ())] or [square * 0])
        magnitudes = [one.products(grad.abs()).abs().sum() for one in self._magnitudes.pop(name, ())]
        rounding = torch.stack(magnitudes or [square * 0]).sum() * self._rounding.get(name, 0.0)
        return torch.stack([products.sum(), products.abs().sum(), square, rounding])

    def _settle(self, name: str) -> None:
        contributions = self._pending.pop(name)
        if len(contributions) > 1:
            # What is known of the single calls is not known of their sum.
            contributions = [one.contribution if isinstance(one, Summed) else one for one in contributions]
        if self.held is not None:
            first = contributions[0]
            # Held until the step's gradient is known: the smaller of the two forms. (A fused layer has chosen before.)
            if len(contributions) == 1 and first.dense_is_smaller and not isinstance(first, Summed):
                contributions = [Dense(first.dense(slice(0, first.num_examples)))]
            self.held.extend(_HeldContribution(name, one) for one in contributions)
        parameter = self.parameters[name]
        self._put(name, combined_squares(contributions, parameter.numel(), parameter.device))
        if self.coordinates is not None:
            self.coordinates[name] = coordinate_squares(contributions, parameter.shape, parameter.device)

    def _put(self, name: str, squares: Tensor) -> None:
        if name in self.squares:
            raise RuntimeError(
                f"{name} was reached by two backwards in one measured micro-batch, so its gradients cannot "
                "be summed before their norm. Call start() and finish() around each backward; under "
                "activation checkpointing of tied weights pass use_reentrant=False"
            )
        self.squares[name] = squares


def _as_computed(inputs: Tensor, output: Tensor) -> Tensor:
    """The input in the narrower dtype that autocast computed in, which takes less memory."""
    is_narrower = inputs.is_floating_point() and output.element_size() < inputs.element_size()
    return inputs.to(output.dtype) if is_narrower else inputs


def _refuse_positions(site: Site, inputs: Tensor, num_examples: int) -> None:
    """Raises if the rows of an input may be something other than examples, and no trial has shown what they are."""
    assert site.rule is not None
    if isinstance(site.module, nn.Embedding) and inputs.dim() == 1 and inputs.shape[0] > 1:
        steps = inputs.diff()
        if bool((steps == 1).all()):  # host sync, in the first measured micro-batch
            raise ValueError(
                f"{site} looked up {inputs.shape[0]} consecutive rows, as many as there are examples: if "
                "they are positions, index it with shape (1, num_positions)"
            )
    between = inputs.shape[1 : inputs.dim() - site.rule.item_dims(site.module)]
    if num_examples > 1 and inputs.shape[0] == num_examples and num_examples in between:
        raise ValueError(
            f"{site} got an input of shape {tuple(inputs.shape)} in the first micro-batch of {num_examples} examples: "
            f"which dimension holds them cannot be told. If it is the first, say so with examples_first=True; else "
            f"give it the examples first"
        )
