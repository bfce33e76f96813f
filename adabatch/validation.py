"""What ``AdaptiveBatch`` checks before a run begins: that its parts fit together and its sizes can be carried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW, NAdam, Optimizer

from adabatch.batch.control import UNLIMITED, Limits
from adabatch.batch.criteria import Criterion
from adabatch.batch.moments import EUCLIDEAN, GRAD_L1, INNER_PRODUCTS, LAYERS, norm_in, quantile_in
from adabatch.batch.plan import PlanGrid
from adabatch.batch.schedules import Schedule
from adabatch.lr.rules import LRRule
from adabatch.optim import KFAC, Shampoo
from adabatch.optim.mup import named_parameters
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.layers import Layers, PerLayer, layers_of, layers_of_weight
from adabatch.runtime.metrics import norm_of
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.wrappers import Wrapper


def default_lr_rule(optimizer: Optimizer) -> LRRule:
    """How the learning rate of an optimizer follows the batch where its user does not say."""
    return "sqrt" if isinstance(optimizer, KFAC | Shampoo) else "none"


def check_reduces(optimizer: Optimizer, size: int) -> None:
    """That ranks which share a model share the statistics that precondition its gradient."""
    if size > 1 and isinstance(optimizer, KFAC) and not optimizer.reduces:
        raise ValueError(
            f"each of the {size} ranks would precondition by the curvature of its own examples, and their weights would"
            f" drift apart: KFAC(model.parameters(), model, **adabatch.across_ranks(model))"
        )


def check_fits(size: int, order: GlobalOrder) -> None:
    """That a batch holds no example of the data set twice."""
    if size > len(order):
        raise ValueError(
            f"a batch of {size} is above the {len(order)} examples of the data set, and may not hold an example twice: "
            f"limit the batch to use at most {len(order)}"
        )


def check_types(optimizer: Any, criterion: Any) -> None:
    """What comes in their place most often: parameters, the class of a criterion, its name."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(criterion, type) or not isinstance(criterion, Criterion):
        raise TypeError(f"criterion must be a criterion or a schedule, such as NormTest(eta=0.5), got {criterion!r}")


def check_followers(optimizer: Optimizer, follow: Collection[str]) -> None:
    """That the optimizer has what is to follow, and in the form whose rule is known."""
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        for name in follow:
            if name not in group:
                raise ValueError(f"follow={name!r}, but {kind} has no {name}: leave it out")
        if "betas" in follow and isinstance(optimizer, NAdam):
            raise ValueError(
                f"follow='betas' has no rule for {kind}, whose momentum follows a schedule in steps: leave it out, or "
                f"use Adam or AdamW"
            )
        decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
        if "weight_decay" in follow and not decoupled:
            raise ValueError(
                f"follow='weight_decay' keeps a decoupled decay constant per example; that of {kind} is part of the "
                f"gradient and needs nothing: leave it out, or use AdamW"
            )


def _way_out(need: str) -> str:
    """What to use where a probe does not give something."""
    norm, quantile = norm_in([need]), quantile_in([need])
    if norm != EUCLIDEAN:
        return f"a probe made with norm= for {norm!r}, as the one is that is chosen where none is given"
    if quantile is not None:
        return f"a probe made with quantile={quantile}, as the one is that is chosen where none is given"
    others = {
        INNER_PRODUCTS: "another probe, such as PerExampleProbe(model, products=True)",
        GRAD_L1: "a probe made with record_l1=True",
        LAYERS: "a probe made with layers=",
    }
    return others.get(need, "another probe")


def suited_probe(
    model: torch.nn.Module,
    optimizer: Optimizer,
    needs: frozenset[str],
    *,
    given: Probe | None,
    wrapper: Wrapper,
    layers: Callable[[], Layers | None] = lambda: None,
) -> Probe | None:
    """The probe given, or the one that suits the model; None where nothing needs one."""
    if not needs:
        return given
    # Only what this optimizer trains: gradients that it does not zero add up over the steps.
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in (held if wrapper.parameters is None else wrapper.parameters)}
    parameters = [p for p in model.parameters() if id(p) in trained]
    if given is None and not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"the optimizer holds none of the model's parameters that require a gradient: build the "
            f"{type(optimizer).__name__} from the parameters() of this {type(model).__name__}"
        )
    probe = given or wrapper.make_probe(
        parameters,
        record_l1=GRAD_L1 in needs,
        layers=layers(),
        norm=norm_of(norm_in(needs), optimizer),
        quantile=quantile_in(needs),
    )
    missing = needs - probe.gives
    if missing:
        if given is None:
            probe.remove()
        raise ValueError(
            f"the run needs {', '.join(sorted(missing))}, which {type(probe).__name__} does not give "
            f"(it gives {', '.join(sorted(probe.gives))}): use another criterion, such as NormTest, or "
            f"{' and '.join(_way_out(need) for need in sorted(missing))}"
        )
    return probe


class MeasuredLayers(NamedTuple):
    """What a probe measures apart.

    Args:
        make: the layers, made where nothing can fail any more.
        weights: how often each one's squared norm counts, by its name; None where the norm is the plain one.
    """

    make: Callable[[], Layers | None]
    weights: dict[str, float] | None


def measured_layers(
    model: torch.nn.Module,
    optimizer: Optimizer,
    needs: Collection[str],
    per_layer: PerLayer | None,
    weights: Mapping[str, float] | None,
) -> MeasuredLayers:
    """The layers to measure: those for the journal, or the parameters sorted by their weight in the norm.

    Args:
        weights: of squared gradient norms, by the names of parameters.

    Raises:
        ValueError: both of them, a parameter without a weight, a name without a parameter, a weight that is not
            positive, or a criterion that compares more than squared norms.
    """
    if weights is None:
        return MeasuredLayers(lambda: None if per_layer is None else layers_of(model, optimizer, per_layer), None)
    if per_layer is not None:
        raise ValueError(f"layer_weights sorts parameters by weight, and per_layer={per_layer!r} otherwise: give one")
    every = named_parameters(model)
    named = {name: p for name, p in every.items() if p.requires_grad}
    missing, unknown = sorted(set(named) - set(weights)), sorted(set(weights) - set(every))
    if missing or unknown:
        raise ValueError(
            f"layer_weights must name every trained parameter, as plan.layer_weights() does: "
            f"{', '.join(missing[:3]) or 'none'} missing, {', '.join(unknown[:3]) or 'none'} unknown"
        )
    wrong = [f"{name}={weights[name]}" for name in named if not 0 < weights[name] < math.inf]
    if wrong:
        raise ValueError(f"layer_weights must be positive and finite, got {', '.join(wrong[:3])}")
    if INNER_PRODUCTS in needs or norm_in(needs) != EUCLIDEAN:
        raise ValueError(
            "layer_weights weigh squared Euclidean norms: use them with NormTest or NoiseScale(), not with a test of "
            "inner products or in the norm of an optimizer, which weighs the layers itself"
        )
    layers, by_name = layers_of_weight({p: float(weights[name]) for name, p in named.items()})
    return MeasuredLayers(lambda: layers, by_name)


def limits_and_grid(
    limits: Limits | None,
    criterion: Criterion,
    *,
    dp_size: int,
    num_compared: int | None,
    micro_sizes: tuple[int, ...],
    in_parts: bool,
) -> tuple[Limits, PlanGrid]:
    """The limits and the plans that a run can carry out, checked against each other."""
    micro = micro_sizes[0]
    alone = (dp_size if num_compared is None else num_compared) == 1
    grid = PlanGrid(dp_size=dp_size, micro_sizes=micro_sizes, min_accumulation=2 if in_parts and alone else 1)
    smallest = micro * dp_size * grid.min_accumulation
    if limits is None:
        if not isinstance(criterion, Schedule):
            raise ValueError(f"{type(criterion).__name__} needs limits=Limits(min=..., max=...)")
        limits = Limits(min=smallest, max=UNLIMITED)
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits(min=..., max=...), got {limits!r}")
    for name, limit in (("min", limits.min), ("max", limits.max)):
        if isinstance(limit, int) and limit < UNLIMITED and limit % dp_size:
            raise ValueError(
                f"limits.{name}={limit} cannot be shared equally by {dp_size} ranks: use a multiple of {dp_size}"
            )
    if isinstance(limits.min, int) and limits.min < smallest:
        two_parts = " (two micro-batches at least, so that their spread can be measured)" if in_parts else ""
        raise ValueError(
            f"limits.min={limits.min} is below the smallest step of {dp_size} rank(s) x {grid.min_accumulation} x "
            f"{micro} examples{two_parts}: use micro_batch_size={max(1, limits.min // (smallest // micro))} or less, "
            f"or limits.min={smallest} or more"
        )
    if isinstance(limits.max, int) and limits.max < smallest:
        raise ValueError(f"limits.max={limits.max} is below the smallest step of {smallest} examples")
    if isinstance(criterion, Schedule):
        for size in criterion.fixed_sizes:
            if grid.nearest(size).global_batch_size != size:
                raise ValueError(
                    f"{type(criterion).__name__} asks for batches of {size}, which {dp_size} rank(s) with "
                    f"micro-batches of {' or '.join(map(str, micro_sizes))} cannot make up: use a multiple of "
                    f"{smallest}, or another micro_batch_size"
                )
    return limits, grid
