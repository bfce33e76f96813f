"""Squared norms of every example's gradient, from the hooks of an ordinary ``loss.backward()``.

While a micro-batch is measured, each module with parameters leaves its input behind in the forward, and the
gradient at its output meets it in the backward; `rules` says what the two give. Nothing runs twice, so the dropout
masks, the data augmentation and the activations are those of the real step, and no example's gradient is stored.

Two seams of autograd carry it. The input is kept with ``save_for_backward``, so activation checkpointing and
offloading treat it as they treat the layer's own: a checkpointed input is recomputed, not held. And the hook that
runs once a parameter's gradient is complete says that all calls sharing the parameter have been heard, so tied
weights are summed before the norm without counting calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adabatch.batch.moments import GradientMoments
from adabatch.runtime.per_example.contributions import (
    Contribution,
    Dense,
    combined_squares,
    squared_sums,
    wide,
)
from adabatch.runtime.per_example.products import example_moments
from adabatch.runtime.per_example.replay import Autocast, Replay, map_tensors, tensors_of
from adabatch.runtime.per_example.rules import RULES, Rule, coupling, randomness

# A parameter that is used outside the module that owns it shows in the first measured micro-batch: the examples' gradients
# do not add up to the parameter's. Honest rounding is far below this share of its squared norm, in bfloat16 too.
_TOLERANCE = 0.05


class _Held(Protocol):
    def products(self, direction: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class _HeldContribution:
    name: str
    contribution: Contribution

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.contribution.products(direction[self.name])


@dataclass(frozen=True)
class _HeldReplay:
    names: Mapping[str, str]  # as the module names its parameters -> as the model does
    replay: Replay

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.replay.products({own: direction[name] for own, name in self.names.items()})


@dataclass(frozen=True)
class ExampleGradients:
    """What one measured micro-batch tells of its examples' gradients; made by `PerExampleNorms.finish`.

    Example i's gradient ``g_i`` is n times the gradient of its share of the loss, n being the examples of the
    micro-batch: for a loss that is a mean over examples, the gradient of its own loss. Always ``mean_i g_i`` is the
    gradient of the micro-batch.

    Args:
        examples_sq: ``s_i = |g_i|^2``, shape (num_examples,), float32 or float64, on the model's device.
        parameters_sq: each parameter's share of ``examples_sq``, by its name in the model, same shape.
    """

    examples_sq: Tensor
    parameters_sq: Mapping[str, Tensor]
    _factor: float
    _held: Sequence[_Held] | None
    _parameters: Mapping[str, nn.Parameter]

    @torch.no_grad()
    def products(self, direction: Mapping[str, Tensor] | None = None) -> Tensor:
        """Inner products ``p_i = <g_i, direction>`` of every example, without a further pass through the model.

        Args:
            direction: a tensor for each trainable parameter, by its name in the model, of the parameter's shape; by
                default the parameters' ``.grad``, which must then hold the step's mean gradient (all micro-batches
                accumulated and reduced, unscaled, not yet clipped).

        Returns:
            Shape (num_examples,), in the type of ``examples_sq``.

        Raises:
            RuntimeError: the norms were measured with ``products=False``, so nothing was held.
        """
        if self._held is None:
            raise RuntimeError(
                "inner products need what the backward left behind: build PerExampleNorms(model, products=True), or "
                "run the losses again with products_by_jvp"
            )
        if direction is None:
            direction = {
                name: parameter.grad
                for name, parameter in self._parameters.items()
                if parameter.grad is not None
            }
        along = {
            name: tensor.to_dense() if tensor.is_sparse else tensor for name, tensor in direction.items()
        }
        total = torch.zeros_like(self.examples_sq)
        for held in self._held:
            total += held.products(along)
        return total * self._factor

    def moments(
        self, direction: Mapping[str, Tensor] | None = None, *, leave_one_out: bool = False
    ) -> GradientMoments:
        """The moments of a step of this one micro-batch on one rank: `example_moments` of its norms and products."""
        return example_moments(self.examples_sq, self.products(direction), leave_one_out_products=leave_one_out)


class PerExampleNorms:
    """Measures ``|g_i|^2`` of every example during the ordinary backward of a micro-batch.

        norms = PerExampleNorms(model, products=True)
        norms.start()
        loss_fn(model(x), y).backward()        # a mean over the examples
        examples = norms.finish()
        examples.examples_sq                   # |g_i|^2
        examples.products()                    # <g_i, g>, from the parameters' .grad

    Between ``finish`` and ``start`` the model carries no hooks, so a step that is not measured pays nothing.

    Modules with a rule (`rules.RULES`: linear, convolution, embedding, the normalisations) cost about as much as their own
    weight gradient again. Any other module that holds parameters is called once more, example by example
    (`replay.Replay`); where it also has children, only its own parameters are treated so, but all of it
    is replayed: parameters that a large module holds directly are cheaper in a small module of their own.

    Args:
        model: the model as it is called in the loop; DDP-wrapped or plain. The examples must lie along the first
            dimension of every module's input; a first dimension of 1 (positions, say) counts as shared by all
            examples and is expanded to them.
        products: also hold what inner products with the step's gradient need, until `ExampleGradients` is dropped.
        check: in the first measured micro-batch, compare the sum of the examples' gradients with each parameter's
            own, which costs a third of a step and one host sync, once. It finds a parameter that is used
            outside the module that owns it.
        rules: rules for the user's own classes of modules, by class; they take precedence.

    Raises:
        ValueError: a module that couples the examples (batch normalisation in training mode), has its examples along
            another dimension, or would have to be replayed with other random numbers; named, with the way out.

    Does not see: terms of the loss that couple examples (contrastive losses, load balancing); they are shared out as
    the backward shares them. A position table indexed with shape (num_positions,) is refused unless there happen to be as many
    positions as examples: index it with shape (1, num_positions).

    Source: Goodfellow 2015 (linear layers); Gray et al. 2023 and 2024 (sequences, normalisation layers).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        products: bool = False,
        check: bool = True,
        rules: Mapping[type[nn.Module], Rule] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._sites = tuple(_sites(model, {**RULES, **rules}))
        self._products = products
        self._unchecked = check
        self._measurement: _Measurement | None = None
        _refuse(model, self._sites)

    def start(self, num_examples: int | None = None) -> None:
        """Begins to measure: call it before the forward of a micro-batch.

        Compiled modules run eagerly until `finish`, because compiled code does not run hooks that were set later.

        Args:
            num_examples: examples in the micro-batch; by default the first dimension of the first tensor that the
                model is called with.

        Raises:
            ValueError: as in the constructor; a module may have changed between evaluation and training mode.
            RuntimeError: the micro-batch before was not finished.
        """
        if self._measurement is not None:
            raise RuntimeError("a micro-batch is being measured: call finish() after its backward, or remove()")
        _refuse(self._model, self._sites)
        self._measurement = _Measurement(
            self._model, self._sites, num_examples, hold=self._products, check=self._unchecked
        )

    def finish(self, *, loss_scale: float = 1.0) -> ExampleGradients:
        """Takes the hooks off and gives what the backward left: call it after the backward of the micro-batch.

        Args:
            loss_scale: the number that the mean loss was multiplied with before its backward: 1 / accumulation
                steps, times the scale of a gradient scaler.

        Raises:
            RuntimeError: no micro-batch was started; a parameter has a gradient that no module accounts for; a
                parameter was reached by two backwards.
        """
        measurement = self._measurement
        if measurement is None:
            raise RuntimeError("no micro-batch is being measured: call start() before its forward")
        self.remove()
        result = measurement.result(loss_scale)
        self._unchecked = False
        return result

    def remove(self) -> None:
        """Takes every hook off and forgets a measurement under way; nothing of it stays on the model."""
        if self._measurement is not None:
            self._measurement.close()
            self._measurement = None


@dataclass(frozen=True)
class _Site:
    """A module that accounts for parameters: by its rule, or by its replay where it has none."""

    name: str
    module: nn.Module
    names: tuple[str, ...]  # its parameters, as the module names them
    rule: Rule | None

    @property
    def label(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


def _sites(model: nn.Module, rules: Mapping[type[nn.Module], Rule]) -> Iterator[_Site]:
    """The modules that account for the model's parameters; a module that appears twice counts once."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> Iterator[_Site]:
        if module in seen:
            return
        seen.add(module)
        is_whole = isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)
        names = tuple(own for own, _ in module.named_parameters(recurse=is_whole))
        children = [] if is_whole else list(module.named_children())
        for own, child in children:
            if isinstance(child, nn.ParameterList | nn.ParameterDict):  # never called: their owner uses what they hold
                names += tuple(f"{own}.{inner}" for inner, _ in child.named_parameters())
        if names:
            rule = rules.get(type(module))
            is_ruled = rule is not None and set(names) <= {"weight", "bias"}
            yield _Site(name, module, names, rule if is_ruled or type(module) not in RULES else None)
        for own, child in children:
            if not isinstance(child, nn.ParameterList | nn.ParameterDict):
                yield from visit(child, f"{name}.{own}" if name else own)

    yield from visit(model, "")


def _refuse(model: nn.Module, sites: Sequence[_Site]) -> None:
    """Raises where examples have no gradients of their own, or where a replay would draw other random numbers."""
    for name, module in model.named_modules():
        reason = coupling(module)
        if reason is not None:
            raise ValueError(f"no per-example gradients through {name or 'the model'}: {reason}")
    for site in sites:
        source = None if site.rule is not None else randomness(site.module)
        if source is not None and any(site.module.get_parameter(own).requires_grad for own in site.names):
            raise ValueError(
                f"no per-example gradients through {site.label}: it has no rule, so it would run again, and "
                f"{source} in it would draw other random numbers than the step did. Set its probability to 0, or move "
                f"the parameters {', '.join(site.names)} to a module of their own"
            )


class _Keep(torch.autograd.Function):
    """Keeps tensors the way autograd keeps them, under whatever ``saved_tensors_hooks`` are active."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on what keeps tensors")


class _Kept:
    """Tensors kept for one backward; taking them lets them go."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        anchor = torch.empty(0, requires_grad=True)
        self._node: Any = _Keep.apply(anchor, *(tensor.detach() for tensor in tensors)).grad_fn

    def take(self) -> tuple[Tensor, ...]:
        if self._node is None:
            raise RuntimeError("two backwards through one measured forward: measure a forward that has one")
        tensors: tuple[Tensor, ...] = self._node.saved_tensors
        self._node = None
        return tensors


class _Measurement:
    """The hooks of one micro-batch and what they have gathered. Gradients in here are those of shares of the loss."""

    def __init__(
        self, model: nn.Module, sites: Sequence[_Site], num_examples: int | None, *, hold: bool, check: bool
    ) -> None:
        self._num_examples = num_examples
        self._squares: dict[str, Tensor] = {}
        self._pending: dict[str, list[Contribution]] = {}  # parameters whose gradient is not complete
        self._held: list[_Held] | None = [] if hold else None
        self._complete: set[str] = set()  # parameters whose gradient is
        self._checks: list[tuple[str, Tensor]] | None = [] if check else None
        self._sums: dict[str, Tensor] = {}
        self._num_calls: dict[_Site, int] = {}
        self._is_replaying = False
        self._parameters: dict[str, nn.Parameter] = {}
        self._keys: dict[_Site, dict[str, str]] = {}
        self._shared: set[str] = set()
        self._handles: list[Any] = []
        self._contexts = ExitStack()
        if "torch._dynamo" in sys.modules:  # compiled code runs no hooks that were set later
            self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
        self._handles.append(model.register_forward_pre_hook(self._count_examples, with_kwargs=True))
        self._set_hooks(sites)

    def _set_hooks(self, sites: Sequence[_Site]) -> None:
        names: dict[nn.Parameter, str] = {}
        for site in sites:
            keys: dict[str, str] = {}
            for own in site.names:
                parameter = site.module.get_parameter(own)
                if not parameter.requires_grad:
                    continue
                key = f"{site.name}.{own}" if site.name else own
                if parameter in names:
                    self._shared.add(names[parameter])
                else:
                    names[parameter] = key
                    self._parameters[key] = parameter
                    self._handles.append(parameter.register_hook(partial(self._on_parameter, key)))
                keys[own] = names[parameter]
            if keys:
                self._keys[site] = keys
                hook = self._on_replay_forward if site.rule is None else self._on_rule_forward
                self._handles.append(
                    site.module.register_forward_hook(partial(hook, site), with_kwargs=True)
                )

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._contexts.close()

    def result(self, loss_scale: float) -> ExampleGradients:
        """What was measured, for whole examples' losses."""
        for name in list(self._pending):
            self._settle(name)
        self._raise_unaccounted()
        assert self._num_examples is not None
        factor = self._num_examples / loss_scale
        squares = {name: square * factor**2 for name, square in self._squares.items()}
        return ExampleGradients(
            torch.stack(list(squares.values())).sum(0),
            squares,
            factor,
            None if self._held is None else tuple(self._held),
            self._parameters,
        )

    def _raise_unaccounted(self) -> None:
        wrong = [name for name in self._complete if name not in self._squares]
        if self._checks:
            numbers = torch.stack([sums for _, sums in self._checks]).tolist()  # host sync, once in a run
            for (name, _), (total, spread, square) in zip(self._checks, numbers, strict=True):
                if abs(total - square) > _TOLERANCE * square + 0.01 * spread:
                    wrong.append(name)
        if wrong:
            raise RuntimeError(
                f"the gradient of {', '.join(sorted(wrong))} is not what the modules that own it account for: it is used "
                "outside of their forward (functionally, or by another module) or inside compiled code. Call the module "
                "instead, or use the norm test from micro-batches"
            )
        if not self._squares:
            raise RuntimeError(
                "no backward reached the model between start() and finish(): call start() before the forward and "
                "finish() after the backward"
            )

    def _count_examples(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._num_examples is None:
            sizes = (tensor.shape[0] for tensor in tensors_of((args, kwargs)) if tensor.dim() > 0)
            self._num_examples = next(sizes, None)

    def _examples_for(self, site: _Site) -> int:
        if self._num_examples is None:
            raise ValueError(
                f"{site.label} ran, but not through the model's own call with a tensor, so the number of examples "
                "is not known: pass start(num_examples=...)"
            )
        return self._num_examples

    # Forward: leave the inputs behind, and a hook at the outputs.

    def _on_rule_forward(
        self, site: _Site, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        if self._is_replaying or not output.requires_grad:
            return None
        assert site.rule is not None
        inputs: Tensor = next(iter((*args, *kwargs.values())))
        num_examples = self._examples_for(site)
        if inputs.dim() <= site.rule.item_dims(module) or inputs.shape[0] not in (1, num_examples):
            raise ValueError(
                f"{site.label} got an input of shape {tuple(inputs.shape)} in a micro-batch of {num_examples} examples: "
                f"the first dimension must be the examples ({num_examples}), or 1 where all examples share it"
            )
        widened = None
        if inputs.shape[0] != num_examples:
            widened = output = output.expand(num_examples, *output.shape[1:])
            inputs = inputs.expand(num_examples, *inputs.shape[1:])
        kept = None
        if "weight" in self._keys[site]:
            kept = _Kept([_as_computed(inputs, output)])
        self._handles.append(output.register_hook(partial(self._on_rule_backward, site, kept)))
        return widened

    def _on_replay_forward(
        self, site: _Site, module: nn.Module, args: Any, kwargs: Any, output: object
    ) -> None:
        leaves = [leaf for leaf in tensors_of(output)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if self._is_replaying or not wanted:
            return
        num_examples = self._examples_for(site)
        for leaf in wanted:
            if leaf.dim() == 0 or leaf.shape[0] != num_examples:
                raise ValueError(
                    f"{site.label} gave an output of shape {tuple(leaf.shape)} in a micro-batch of {num_examples} "
                    f"examples: the first dimension must be the examples"
                )
        self._num_calls[site] = self._num_calls.get(site, 0) + 1
        arguments = map_tensors(lambda _: torch.empty(0), (args, kwargs))
        backward = partial(
            self._on_replay_backward,
            site,
            arguments,
            _Kept(tensors_of((args, kwargs))),
            [leaf.requires_grad for leaf in leaves],
            Autocast.now(wanted[0].device.type),
        )
        self._handles.append(torch.autograd.graph.register_multi_grad_hook(wanted, backward))

    # Backward: the gradients at the outputs meet the inputs.

    def _on_rule_backward(self, site: _Site, kept: _Kept | None, grad: Tensor) -> None:
        assert site.rule is not None
        inputs = grad.new_empty(0) if kept is None else kept.take()[0]
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for own, contribution in site.rule.contributions(site.module, inputs, grad):
                self._pending.setdefault(self._keys[site][own], []).append(contribution)

    def _on_replay_backward(
        self,
        site: _Site,
        arguments: object,
        kept: _Kept,
        has_grad: Sequence[bool],
        autocast: Autocast,
        received: Sequence[Tensor | None],
    ) -> None:
        keys = self._keys[site]
        grads = iter(received)
        replay = Replay(
            site.module,
            tuple(keys),
            arguments,
            kept.take(),
            [next(grads) if has else None for has in has_grad],
            self._examples_for(site),
            autocast,
        )
        is_alone = self._num_calls[site] == 1 and self._shared.isdisjoint(keys.values())
        self._is_replaying = True  # the module's children run again, and are not to be heard
        try:
            with torch.no_grad():
                if is_alone and not (self._held is not None and replay.dense_is_smaller):
                    self._settle_replay(site, replay)
                else:
                    for own, values in replay.dense().items():
                        self._pending.setdefault(keys[own], []).append(Dense(values))
        finally:
            self._is_replaying = False

    def _settle_replay(self, site: _Site, replay: Replay) -> None:
        """The norms of a module that no other call shares parameters with, a run of examples at a time."""
        runs: list[dict[str, Tensor]] = []
        keys = self._keys[site]
        for run in replay.gradients():
            runs.append({own: squared_sums(values) for own, values in run.items()})
            if self._checks is not None:
                for own, values in run.items():
                    self._sums[keys[own]] = self._sums.get(keys[own], 0) + values.sum(0)
        for own, key in keys.items():
            self._put(key, torch.cat([run[own] for run in runs]))
        if self._held is not None:
            self._held.append(_HeldReplay(keys, replay))

    def _on_parameter(self, name: str, grad: Tensor) -> None:
        """The parameter's gradient is complete: every call that shares it has been heard."""
        self._complete.add(name)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if self._checks is not None:
                self._check(name, grad.to_dense() if grad.is_sparse else grad)
            if name in self._pending:
                self._settle(name)

    def _check(self, name: str, grad: Tensor) -> None:
        """Notes the products of the examples' gradients with their sum, which add up to its squared norm."""
        assert self._checks is not None
        if name in self._sums:
            products = (wide(self._sums.pop(name)) * wide(grad)).sum().reshape(1)
        else:
            products = sum(one.products(grad) for one in self._pending.get(name, ()))
        square = wide(grad).square().sum()
        self._checks.append((name, torch.stack([products.sum(), products.abs().sum(), square])))

    def _settle(self, name: str) -> None:
        contributions = self._pending.pop(name)
        if self._held is not None:
            if len(contributions) == 1 and contributions[0].dense_is_smaller:
                contributions = [Dense(contributions[0].dense(slice(None)))]
            self._held.extend(_HeldContribution(name, one) for one in contributions)
        self._put(name, combined_squares(contributions, self._parameters[name].numel()))

    def _put(self, name: str, squares: Tensor) -> None:
        if name in self._squares:
            raise RuntimeError(
                f"{name} was reached by two backwards in one measured micro-batch, so its gradients cannot be summed "
                "before their norm: call start() and finish() around each backward (reentrant checkpointing "
                "of tied weights has several: pass use_reentrant=False)"
            )
        self._squares[name] = squares


def _as_computed(inputs: Tensor, output: Tensor) -> Tensor:
    """The input in the narrower type that autocast computed with: half the memory, and the values of the real step."""
    narrower = inputs.is_floating_point() and output.element_size() < inputs.element_size()
    return inputs.to(output.dtype) if narrower else inputs
