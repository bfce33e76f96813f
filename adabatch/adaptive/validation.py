"""What ``AdaptiveBatch`` checks before a run begins: that its parts fit together and its sizes can be made up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, Adam, AdamW, NAdam, Optimizer

from adabatch.adaptive.options import EngineOptions, Guard, Measure
from adabatch.adaptive.planning import Planner, Policy
from adabatch.arguments import allowed_by, conform, require_type, shown, some, whole
from adabatch.batch.control import UNLIMITED, Control, Limits
from adabatch.batch.criteria import CoordinateNormTest, Criterion, DecaysLR, NormTest
from adabatch.batch.moments import EUCLIDEAN
from adabatch.batch.needs import Needs
from adabatch.batch.plan import Duration, PlanGrid, Progress, micro_batch_sizes
from adabatch.batch.schedules import Schedule
from adabatch.guards.same_settings import scaler_settings, versions
from adabatch.lr.follow import Followers, UpdateRules
from adabatch.lr.rules import NOISE_RULES, LRRule, Setting
from adabatch.optim.mup import check_ratios, named_parameters
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.optimizers.joined import each_of, kind_of, without_rate
from adabatch.runtime.optimizers.traits import ChecksRanks, ChecksStep, PrefersLRRule
from adabatch.runtime.probes.layers import Layers, layers_of, layers_of_weight
from adabatch.runtime.probes.metrics import norm_of
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.wrappers.backward import Backward

# Optimizers with decoupled weight decay; Muon came with torch 2.9.
DECOUPLED: tuple[type[Optimizer], ...] = (AdamW, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else []))


def engine_of(
    model: torch.nn.Module,
    optimizer: Optimizer,
    given: EngineOptions | Engine,
    local_sgd: LocalSGD | None,
    backward: Backward | None = None,
) -> Engine:
    """The engine that was given, or the one that the model's type and ``local_sgd`` select, with its options.

    ``backward`` is that of a host around the model.
    """
    if isinstance(given, Engine):
        return given
    if not isinstance(given, EngineOptions):
        raise TypeError(f"engine must be EngineOptions(...), or the Engine of a host, got {shown(given)}")
    if local_sgd is not None:
        if backward is not None:
            raise ValueError(
                "local_sgd= averages plain models: give the model and the optimizer without Fabric's setup"
            )
        return local_sgd.engine(model, optimizer, given.gradient_sync, given.scaler)
    engine = engine_for(model, given.gradient_sync, given.scaler, backward=backward)
    for one in each_of(optimizer):
        if isinstance(one, ChecksRanks):
            one.check_ranks(engine.collectives.size)
    return engine


def enabled_scaler(given: EngineOptions | Engine) -> GradScaler | None:
    """The gradient scaler that was given, if it does anything."""
    scaler = given.scaler if isinstance(given, EngineOptions) else None
    return scaler if scaler is not None and scaler.is_enabled() else None


def check_before_step(optimizer: Optimizer) -> None:
    """Checks the settings of an update: the learning rates of a width plan, and whatever the optimizer checks.

    Raises:
        ValueError: if a check fails.
    """
    check_ratios(optimizer)
    for one in each_of(optimizer):
        if isinstance(one, ChecksStep):
            one.check_before_step()


def check_loop(
    consumed: Progress, collectives: Collectives, *, until: Any, count: Any, weigh: Any, allow_same_data: Any
) -> bool:
    """Checks the arguments of ``AdaptiveBatch.steps``, at its first step and not at the end; returns the last one."""
    require_type(callable(count), "count must be a function from a micro-batch to its number of examples", count)
    require_type(weigh is None or callable(weigh), "weigh must be a function of a micro-batch, or None", weigh)
    allow_same_data = conform("allow_same_data", allow_same_data, allowed_by(bool))
    if until is None and not collectives.fixed:
        raise ValueError(
            "replicas that may join later cannot count passes over the data: give steps(until=), in examples or steps"
        )
    if until is not None and not isinstance(until, Duration):
        raise TypeError(f"until must be a duration, such as adabatch.examples({shown(until)}), got {shown(until)}")
    try:
        if until is not None:
            consumed.count(until.unit)  # raises for a unit that the run does not count
    except ValueError as error:
        raise ValueError(f"until={until} cannot be reached: {error}") from None
    return bool(allow_same_data)


def checked_rules(
    model: torch.nn.Module,
    optimizer: Any,
    criterion: Any,
    *,
    lr_rule: LRRule | None,
    follow: Followers | Collection[Setting] | None,
) -> UpdateRules:
    """Checks the arguments of a run; returns the rules that apply, of which the optimizer may prefer one."""
    rule = preferred_rule(optimizer, criterion) if lr_rule is None else lr_rule
    if follow is None:
        # Only as a part of the default rule: whoever chooses a rule has tuned the betas beside it.
        betas: tuple[Setting, ...] = ("betas",)
        followers = Followers(betas if lr_rule is None and rule == "gain" and has_betas_of_adam(optimizer) else ())
    else:
        followers = Followers.of(follow)
    decay = {"lr_decay": criterion.lr_decay} if isinstance(criterion, DecaysLR) else {}
    # raises for an unknown rule, before anything below compares it with words
    rules = UpdateRules(rule, followers, **decay)
    check_followers(optimizer, followers.settings)
    check_rates(optimizer, rule)
    warn_of_linear(rule, criterion)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: nothing can train in this model"
        )
    return rules


def preferred_rule(optimizer: Optimizer, criterion: Criterion) -> LRRule:
    """The default rule: the one that the criterion or the optimizer prefers; "gain" if the batch follows noise.

    On MNIST at 14x14, "gain" with betas that follow had the lowest validation loss of all rules at equal examples with
    AdamW, and with SGD "gain" was level with "linear", which is known to diverge elsewhere (benchmarks/LOG.md). It
    reads the Euclidean noise; in other norms no rule has been compared.
    """
    if isinstance(criterion, DecaysLR):  # SGD's decay is that of lr / b, Adam's that of lr / sqrt(b)
        return "linear" if all(isinstance(one, SGD) for one in each_of(optimizer)) else "sqrt"
    # one rule for all optimizers of a step, so the first that prefers one decides
    preferred = [one.preferred_lr_rule for one in each_of(optimizer) if isinstance(one, PrefersLRRule)]
    if preferred:
        return cast("LRRule", preferred[0])
    return "gain" if criterion.needs.euclidean and without_rate(optimizer) is None else "none"


def has_betas_of_adam(optimizer: Optimizer) -> bool:
    """Whether all betas that there are belong to torch's own Adam or AdamW, whose count of steps can follow them."""
    having = [one for one in each_of(optimizer) if any("betas" in group for group in one.param_groups)]
    own = [isinstance(one, Adam | AdamW) and type(one).__module__.startswith("torch.") for one in having]
    # only torch's own: a subclass from elsewhere may count its steps in another way
    return bool(own) and all(own)


def needs_of(criterion: Criterion, rule: LRRule, measure: Measure) -> Needs:
    """What a probe must measure: for the criterion, for the rule, and for the journal."""
    layers = measure.layers is not None or measure.layer_weights is not None
    # seconds are timed by a stopwatch, and no probe gives them
    needs = replace(criterion.needs, seconds=False) | Needs(l1=measure.l1, layers=layers)
    noise = criterion.needs.seconds or rule in NOISE_RULES or measure.monitor  # steps are timed as they are measured
    return needs.with_noise() if noise else needs


def check_types(
    model: Any,
    optimizer: Any,
    criterion: Any,
    control: Any,
    *,
    probe: Any,
    local_sgd: Any,
    measure: Any,
    guard: Any,
) -> None:
    """Checks the types of arguments, and for common mistakes: parameters instead of an optimizer, a class or its name.

    Raises:
        TypeError: if one is of another type, or a class instead of an object of it.
        ValueError: if the optimizer computes gradients by itself.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if any(isinstance(one, LBFGS) for one in each_of(optimizer)):
        raise ValueError(
            "LBFGS computes gradients itself, several times per step, by a closure: they would neither be measured nor "
            "averaged over the micro-batches. Use an optimizer that steps along the gradient that it finds, such as "
            "SGD or AdamW"
        )
    if isinstance(criterion, type) or not isinstance(criterion, Criterion):
        raise TypeError(
            f"criterion must be a criterion or a schedule, such as NormTest(eta=0.7), got {shown(criterion)}"
        )
    if not isinstance(criterion.needs, Needs):
        raise TypeError(
            f"the needs of {type(criterion).__name__} must be an adabatch.batch.Needs, such as "
            f"Needs(noise='euclidean'), or Needs() if nothing is to be measured, got {shown(criterion.needs)}"
        )
    for name, value, kind, such_as in (
        ("model", model, torch.nn.Module, "a torch.nn.Module"),
        ("measure", measure, Measure, "Measure(...)"),
        ("guard", guard, Guard, "Guard(...)"),
        ("control", control, Control | None, "Control(...)"),
        ("local_sgd", local_sgd, LocalSGD | None, "the LocalSGD of this model and optimizer"),
        ("probe", probe, Probe | None, "a probe, such as PerExampleProbe(model)"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {such_as}, got {shown(value)}")


def check_followers(optimizer: Optimizer, follow: Collection[str]) -> None:
    """Checks that the optimizer, or one of several, has the settings that should follow, in a known form."""
    for name in follow:
        having = [one for one in each_of(optimizer) if any(name in group for group in one.param_groups)]
        if not having or not all(name in group for one in having for group in one.param_groups):
            raise ValueError(f"follow={name!r}, but {kind_of(optimizer)} has no {name}: leave it out of follow")
        for one in having:
            _check_follower(one, name)


def _check_follower(optimizer: Optimizer, name: str) -> None:
    kind = type(optimizer).__name__
    if name == "betas" and isinstance(optimizer, NAdam):
        raise ValueError(
            f"follow='betas' has no rule for {kind}, since its momentum follows a schedule in steps: leave it out, or "
            f"use Adam or AdamW"
        )
    decoupled = all(
        isinstance(optimizer, DECOUPLED) or group.get("decoupled_weight_decay", False)
        for group in optimizer.param_groups
    )
    if name == "weight_decay" and not decoupled:
        raise ValueError(
            f"follow='weight_decay' keeps a decoupled decay constant per example, but the decay of {kind} is part of "
            f"the gradient and needs no change: leave it out, or use AdamW"
        )


def check_rates(optimizer: Optimizer, rule: LRRule) -> None:
    """Checks that there is a learning rate for the rule to change."""
    kind = without_rate(optimizer)
    if kind is not None and rule != "none":
        raise ValueError(
            f"lr_rule={rule!r} multiplies the learning rate, but {kind} sets its own (lr=None): use lr_rule='none', or "
            f"give the optimizer a learning rate (Adafactor: relative_step=False)"
        )


def warn_of_linear(rule: LRRule, criterion: Criterion) -> None:
    """Warns that the linear rule is too large at the batch where a norm test comes to rest."""
    if rule == "linear" and isinstance(criterion, NormTest | CoordinateNormTest):
        eta = criterion.eta
        rest = f" (about {(1 - eta * eta) / (eta * eta):.2g} times the noise scale at eta={eta})" if eta < 1 else ""
        warnings.warn(
            f"lr_rule='linear' multiplies the learning rate by the batch, which is right only well below the noise "
            f"scale, but {type(criterion).__name__} lets the batch grow until noise no longer dominates{rest}. Runs of "
            f"SGD failed to train with it. Use lr_rule='gain', which is linear as long as noise dominates",
            # past checked_rules, prepared and the constructor, at the user's line
            stacklevel=5,
        )


def warn_without_room(optimizer: Optimizer, followers: Followers, largest_ratio: float) -> None:
    """Warns of betas that cannot follow a growing batch, as they are at their floor already."""
    if "betas" not in followers.settings or largest_ratio <= 1:
        return
    for number, group in enumerate(optimizer.param_groups):
        if "betas" not in group:
            continue
        betas, rooms = group["betas"], followers.room(group["betas"])
        stuck = [k for k, room in enumerate(rooms) if room == 1.0]
        if stuck:
            names = " and ".join(f"beta{k + 1}={float(betas[k])}" for k in stuck)
            warnings.warn(
                f"follow='betas' cannot lower {names} of parameter group {number}, which is at its floor of "
                f"{' and '.join(str(followers.floors(betas)[k]) for k in stuck)} already. Start from a larger value "
                f"(0.999 for beta2 at a small batch), or lower the floor with "
                f"follow=adabatch.lr.Followers(('betas',), beta2_floor=...)",
                # past prepared and the constructor, at the user's line
                stacklevel=4,
            )


def suited_probe(
    optimizer: Optimizer,
    needs: Needs,
    *,
    given: Probe | None,
    engine: Engine,
    layers: Callable[[], Layers | None] = lambda: None,
) -> Probe | None:
    """The probe that was given, or the engine's own; None if nothing is to be measured."""
    given = None if given is None else engine.fit_probe(given)
    # Only what this optimizer trains: gradients that it does not zero add up over the steps.
    parameters = engine.trained(optimizer)
    if given is not None:
        _check_measured(given, parameters, engine.model)
    # Without a probe, layers may be frozen now and thawed later.
    if given is None and not any(p.requires_grad or not needs for p in parameters):
        raise ValueError(
            f"the optimizer holds none of the model's parameters that require a gradient: build the "
            f"{type(optimizer).__name__} from the parameters() of this {type(engine.model).__name__}"
        )
    if not needs:
        return given
    probe = given or engine.make_probe(
        parameters,
        record_l1=needs.l1,
        layers=layers(),
        norm=norm_of(needs.noise or EUCLIDEAN, optimizer),
        quantile=needs.quantile,
    )
    missing = needs.lacking(probe.gives)
    if missing:
        # the constructor's undo does not know this probe yet
        if given is None:
            probe.remove()
        raise ValueError(
            f"the run needs {', '.join(missing.words())}, which {type(probe).__name__} does not give (it gives "
            f"{', '.join(probe.gives.words())}): use another criterion, such as NormTest, or "
            f"{' and '.join(missing.ways_out())}"
        )
    return probe


def _check_measured(probe: Probe, trained: Sequence[Tensor], model: nn.Module) -> None:
    """Checks that a probe that was given measures what is trained.

    Raises:
        ValueError: if it measures none of it.
    """
    if probe.measured is None:
        return
    ids, measured = {id(p) for p in trained}, {id(p) for p in probe.measured}
    # by the model's own tensors, since some engines train others
    wanted = {name: id(p) for name, p in model.named_parameters() if p.requires_grad and id(p) in ids}
    missing = [name for name, each in wanted.items() if each not in measured]
    if not missing:
        return
    which = f"the {type(probe).__name__} does not measure {some(missing)}"
    if len(missing) == len(wanted):
        raise ValueError(f"{which}: it belongs to another model. Make it from the model that AdaptiveBatch is given")
    warnings.warn(
        f"{which}, and the batch follows the noise of the other parameters alone: make it from the whole model, unless "
        f"this is meant",
        RuntimeWarning,
        stacklevel=4,
    )


class MeasuredLayers(NamedTuple):
    """The layers whose moments a probe measures separately.

    Args:
        make: makes the layers, once nothing can fail any more.
        weights: weight of each layer's squared norm, by its name; None for the plain norm.
    """

    make: Callable[[], Layers | None]
    weights: dict[str, float] | None


def measured_layers(
    model: torch.nn.Module,
    optimizer: Optimizer,
    needs: Needs,
    measure: Measure,
    probe: Probe | None,
) -> MeasuredLayers:
    """The layers to measure: those for the journal, or the parameters grouped by their weight in the norm.

    Raises:
        ValueError: if weights are given together with a probe, if a parameter has no weight, a name has no parameter,
            or a weight is not positive, or if the criterion compares more than squared norms.
    """
    weights = measure.layer_weights
    if weights is None:
        kind = measure.layers
        return MeasuredLayers(lambda: None if kind is None else layers_of(model, optimizer, kind), None)
    if probe is not None:
        raise ValueError(
            "layer_weights groups the parameters into layers, which a probe must know when it is made: leave probe out"
        )
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
    if needs.products or needs.noise not in (None, EUCLIDEAN):
        raise ValueError(
            "layer_weights weigh squared Euclidean norms: use them with NormTest or NoiseScale(), and not with a test "
            "of inner products or with the norm of an optimizer, which weighs the layers itself"
        )
    layers, by_name = layers_of_weight({p: float(weights[name]) for name, p in named.items()})
    return MeasuredLayers(lambda: layers, by_name)


class Prepared(NamedTuple):
    """What follows from the arguments of a run, once they are checked against each other.

    Args:
        planner: of the run.
        needs: what a probe must measure.
        layers: makes the layers whose moments a probe measures separately.
    """

    planner: Planner
    needs: Needs
    layers: Callable[[], Layers | None]


def prepared(
    model: torch.nn.Module,
    optimizer: Optimizer,
    criterion: Criterion,
    engine: Engine,
    *,
    micro_batch_size: int,
    max_micro_batch_size: int | None,
    limits: Limits | None,
    control: Control | None,
    lr_rule: LRRule | None,
    follow: Followers | Collection[Setting] | None,
    reference_batch_size: int | None,
    tokens_per_example: int | None,
    measure: Measure,
    probe: Probe | None,
) -> Prepared:
    """Checks the arguments of a run, and makes its planner of them. The model gets no hooks yet."""
    micro_batch_size = whole("micro_batch_size", micro_batch_size, at_least=1)
    largest = micro_batch_size
    if max_micro_batch_size is not None:
        largest = whole("max_micro_batch_size", max_micro_batch_size, at_least=1)
    if reference_batch_size is not None:
        reference_batch_size = whole("reference_batch_size", reference_batch_size, at_least=1)
    if tokens_per_example is not None:
        tokens_per_example = whole("tokens_per_example", tokens_per_example, at_least=1)
    rules = checked_rules(model, optimizer, criterion, lr_rule=lr_rule, follow=follow)
    needs = needs_of(criterion, rules.rule, measure)
    layers = measured_layers(model, optimizer, needs, measure, probe)
    # For recorded norms alone a probe measures no noise, and needs no parts to do so.
    in_noise = probe is not None or bool(replace(needs, l1=False))
    limits, grid = limits_and_grid(
        limits,
        criterion,
        dp_size=engine.collectives.size,
        num_compared=engine.num_compared,
        micro_sizes=micro_batch_sizes(micro_batch_size, largest),
        in_parts=in_noise and not (probe is not None and probe.gives.examples),
    )
    policy = Policy(
        criterion=criterion,
        control=control or Control(),
        limits=limits,
        rules=rules,
        counts_gain=in_noise,
        layer_weights=layers.weights,
        reference_batch_size=reference_batch_size,
        tokens_per_example=tokens_per_example,
    )
    planner = Planner(policy, grid)
    if follow is not None:
        warn_without_room(optimizer, rules.followers, limits.at(planner.consumed)[1] / planner.reference)
    return Prepared(planner, needs, layers.make)


def given_settings(
    engine: Engine, options: EngineOptions | Engine, local_sgd: LocalSGD | None, measure: Measure, guard: Guard
) -> dict[str, object]:
    """The settings that the planner does not have, by name; they must be equal on all ranks too."""
    chosen = options if isinstance(options, EngineOptions) else EngineOptions()
    return {
        **versions(),
        "engine": type(engine),
        "gradient_sync": chosen.gradient_sync,
        "scaler": scaler_settings(chosen.scaler),
        "local_sgd": local_sgd is not None,  # which compares its own settings
        "measure": measure,
        "guard": replace(guard, trial=None),
        "trial=": guard.trial is not None,
    }


def limits_and_grid(
    limits: Limits | None,
    criterion: Criterion,
    *,
    dp_size: int,
    num_compared: int,
    micro_sizes: tuple[int, ...],
    in_parts: bool,
) -> tuple[Limits, PlanGrid]:
    """The limits, and the plans that the run can make up, checked against each other."""
    micro = micro_sizes[0]
    # a step of a single part shows no spread
    least = 2 if in_parts and num_compared == 1 else 1
    grid = PlanGrid(dp_size=dp_size, micro_sizes=micro_sizes, min_accumulation=least)
    smallest = micro * dp_size * grid.min_accumulation
    if limits is None:
        if not isinstance(criterion, Schedule):
            raise ValueError(f"{type(criterion).__name__} needs limits=Limits(min=..., max=...)")
        limits = Limits(min=smallest, max=UNLIMITED)
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits(min=..., max=...), got {shown(limits)}")
    for name, limit in (("min", limits.min), ("max", limits.max)):
        # UNLIMITED is no number that the user gave, and need not divide
        if isinstance(limit, int) and limit < UNLIMITED and limit % dp_size:
            raise ValueError(
                f"limits.{name}={limit} cannot be shared equally by {dp_size} ranks: use a multiple of {dp_size}"
            )
    # A schedule as a limit moves during the run: `Limits.runnable` lowers its floor where no plan fits.
    if isinstance(limits.min, int) and limits.min < smallest:
        two_parts = " (at least two micro-batches, so that their spread can be measured)" if in_parts else ""
        raise ValueError(
            f"limits.min={limits.min} is below the smallest step of {dp_size} rank(s) x {grid.min_accumulation} x "
            f"{micro} examples{two_parts}: use micro_batch_size={max(1, limits.min // (smallest // micro))} or less, "
            f"or limits.min={smallest} or more"
        )
    if isinstance(limits.max, int) and limits.max < smallest:
        raise ValueError(
            f"limits.max={limits.max} is below the smallest step of {smallest} examples: use limits.max={smallest} or "
            f"more, or a smaller micro_batch_size"
        )
    if isinstance(criterion, Schedule):
        for size in criterion.fixed_sizes:
            if grid.nearest(size).global_batch_size != size:
                raise ValueError(
                    f"{type(criterion).__name__} asks for batches of {size} examples, which {dp_size} rank(s) with "
                    f"micro-batches of {' or '.join(map(str, micro_sizes))} cannot form: use a multiple of "
                    f"{smallest}, or another micro_batch_size"
                )
    return limits, grid
