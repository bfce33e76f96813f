"""Checks that adaptive batches do on your model, loader and ranks what they do in this library's own tests.

Each check is a function of ``make``, which builds a ``Training`` anew, with the same weights every time. On several
ranks all call the same checks in the same order, and all get the same answer. Nothing is written to disk.
"""

from __future__ import annotations

import hashlib
import io
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.batch.control import Limits
from adabatch.batch.moments import EXAMPLES, GradientMoments
from adabatch.batch.plan import steps
from adabatch.batch.schedules import Constant, Schedule, Stage, Stages
from adabatch.runtime.collectives import Collectives, collectives_of
from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.data import GlobalOrder, num_examples_in
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.sharding import is_sharded, own_piece

ACCUMULATION = 4
"""Micro-batches a rank in the largest step of any check."""

UNEVEN_ACCUMULATION = 3
"""Micro-batches a rank where the bits of the weighting count: a third is not a number of float32, a quarter is."""

STEPS_BEFORE_CHANGE = 3
STEPS_AFTER_CHANGE = 4
PROBED_STEPS = 3
STEPS_BEFORE_SAVE = 3
STEPS_AFTER_SAVE = 3
WARM_UP_PAIRS = 3

PROBE_TOLERANCE = 1e-4
"""Relative, for float32: sums of a million float32 squares in another order differ by 1e-6 to 1e-5."""

ROUNDINGS = 4
"""Roundings of the coarsest parameter type that a probe may be off by, where those are more than the tolerance."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run consists of, before ``AdaptiveBatch`` is put around it.

    Args:
        model: as it is trained: plain, in ``DistributedDataParallel`` or sharded by ``fully_shard``.
        optimizer: over its parameters.
        loader: a ``GlobalOrder``, or any iterable of micro-batches that can be passed over again.
        loss: (model, micro-batch) -> mean loss over its examples, shape ().
        micro_batch_size: examples in one forward and backward on one rank.
        probe: to be checked; by default the one that suits the model.
        count: examples in a micro-batch.
        weigh: what a micro-batch counts for in the gradient, where not for its examples; see ``AdaptiveBatch.steps``.
    """

    model: nn.Module
    optimizer: Optimizer
    loader: GlobalOrder | Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    micro_batch_size: int
    probe: Probe | None = None
    count: Callable[[Any], int] = num_examples_in
    weigh: Callable[[Any], float] | None = None


Make = Callable[[], Training]
"""Builds a training anew: another model and optimizer, the same weights, the same data from its beginning."""


class Check(NamedTuple):
    """What a check found; the same on all ranks.

    Args:
        name: of the check.
        passed: whether what was measured is allowed.
        measured: the number that decides; its meaning is in the explanation.
        allowed: the largest that passes; None where the number is only reported.
        explanation: a sentence.
    """

    name: str
    passed: bool
    measured: float
    allowed: float | None
    explanation: str


def all_checks(make: Make, *, num_steps: int = 20, max_cost: float | None = None) -> Iterator[Check]:
    """The checks of this module one after the other, the cheapest first.

    Args:
        make: builds a training anew.
        num_steps: steps beside the hand-written loop, and pairs of steps whose time is compared.
        max_cost: largest time of a probed step over one without; None reports it only.

    Raises:
        ValueError: something that cannot be checked, see each check; or fewer than 4 steps.
    """
    if num_steps < 4:
        raise ValueError(f"the checks need at least 4 steps, got {num_steps}")
    if max_cost is not None and not max_cost > 0:
        raise ValueError(f"max_cost must be positive (1.05 allows 5 % more time), got {max_cost}")
    yield drift(make)
    yield probe_agrees(make)
    yield constant_policy(make, num_steps=num_steps)
    yield resume(make)
    yield cost(make, num_pairs=num_steps, max_cost=max_cost)


# --- the checks -----------------------------------------------------------------------------------------------------


def drift(make: Make) -> Check:
    """Whether all ranks hold the same parameters, to the bit, after the accumulation went from 1 to 4 at step 4.

    It measures the ranks that differ from the others. Also checked: that every rank made the steps that were planned.
    Sharded parameters are held once, so of those only the steps are compared.

    Raises:
        ValueError: a data set smaller than the largest step, or a loader whose pass ends within the check.
    """
    training, ranks = _begin(make)
    small, large = _sizes(training, ranks, 1), _sizes(training, ranks, ACCUMULATION)
    schedule = Stages(small, [Stage(steps(STEPS_BEFORE_CHANGE), large)])
    differed_before = _odd_ranks(training.model, ranks)
    # One micro-batch on one rank has no spread to measure.
    batches = _adaptive(training, schedule, probed=ranks.size > 1)
    total = STEPS_BEFORE_CHANGE + STEPS_AFTER_CHANGE
    made: list[int] = []
    for step, parts in _steps(training, batches, total):
        if len(parts) < step.plan.accumulation_steps:
            raise ValueError(
                f"the loader's pass ended in step {len(made) + 1} of {total}, so its size was not the planned one: "
                f"give a loader of at least "
                f"{STEPS_BEFORE_CHANGE + STEPS_AFTER_CHANGE * ACCUMULATION} micro-batches a rank, or a GlobalOrder"
            )
        made.append(len(parts))
        _update(training)
    applied = batches.progress.steps
    batches.remove()
    odd = _odd_ranks(training.model, ranks)
    planned = [1] * STEPS_BEFORE_CHANGE + [ACCUMULATION] * STEPS_AFTER_CHANGE
    together = ranks.agree((made, applied, batches.state_dict()))
    (as_planned,) = ranks.minimum_of(made == planned and applied == total)
    measured = float(len(odd))
    if differed_before:
        text = f"{_named(differed_before)} differed from the others before the first step"
    elif odd:
        text = f"{_named(odd)} drifted from the others in {total} steps, over a change from 1 to {ACCUMULATION}"
    elif not together:
        text = "the ranks made different steps or hold different plans"
    elif not as_planned:
        text = f"micro-batches {made} in {applied} updates, but {planned} in {total} were planned"
    elif ranks.size == 1:
        text = f"{total} steps as planned; one rank has none to drift from"
    elif is_sharded(training.model):
        text = f"{total} steps as planned on {ranks.size} ranks; each holds its own shard of the parameters"
    else:
        text = f"{ranks.size} ranks equal to the bit after {total} steps, over a change from 1 to {ACCUMULATION}"
    return Check("drift", not odd and not differed_before and together and bool(as_planned), measured, 0.0, text)


def probe_agrees(make: Make, *, allowed: float | None = None) -> Check:
    """Whether the probe's moments are those of gradients computed part by part, in backward passes of their own.

    It measures the largest relative error of any of the moments in three steps, each with the weights and the random
    numbers (dropout) of the step itself. The gradients are added up in float64: twice to four times the memory of the
    gradient. With FSDP2 every rank runs every part, weighted by zero but for one rank.

    Args:
        make: builds a training anew.
        allowed: largest relative error; by default 1e-4, or 4 roundings of the coarsest type among the parameters.

    Raises:
        ValueError: a data set smaller than the step, or a probe whose parts are single examples.
    """
    training, ranks = _begin(make)
    if training.probe is not None and EXAMPLES in training.probe.gives:
        raise ValueError(
            f"the parts of {type(training.probe).__name__} are single examples, and this check takes micro-batches "
            f"apart: check with another probe, or with none for the one that suits the model"
        )
    parameters = _trained(training)
    if allowed is None:
        allowed = max(PROBE_TOLERANCE, ROUNDINGS * max(torch.finfo(p.dtype).eps for p in parameters))
    batches = _adaptive(training, Constant(_sizes(training, ranks, ACCUMULATION)), probed=True)
    by_parts = _sharded_moments if is_sharded(training.model) else _local_moments
    worst, worst_name = 0.0, "grad_sq"
    num_parts = 0
    for step, parts in _steps(training, batches, PROBED_STEPS):
        assert step.moments is not None
        after = _Randomness.now(parameters[0].device)
        gradient = [p.grad for p in parameters]
        expected = by_parts(training, parts, parameters, ranks)
        for parameter, grad in zip(parameters, gradient, strict=True):
            parameter.grad = grad
        after.restore()
        for name in ("part_sq", "grad_sq", "part_size", "num_examples", "num_parts"):
            error = _relative_error(getattr(step.moments, name), getattr(expected, name))
            if not error <= worst:
                worst, worst_name = error, name
        num_parts = expected.num_parts
        _update(training)
    batches.remove()
    worst = _largest(worst, ranks)
    passed = worst <= allowed
    text = (
        f"moments of {PROBED_STEPS} steps of {num_parts} parts as computed part by part"
        if passed
        else f"{worst_name} is off by {worst:.2g} of what gradients computed part by part give"
    )
    return Check("probe", passed, worst, allowed, text)


def constant_policy(make: Make, *, num_steps: int = 20) -> Check:
    """Whether training around ``AdaptiveBatch`` with a constant batch is a hand-written loop, to the bit.

    It measures the largest difference in weights, buffers or optimizer state on any rank. The loop is plain gradient
    accumulation over the same micro-batches with the same random numbers. The probe is on: it changes nothing either.

    Raises:
        ValueError: a data set smaller than the step, or a ``make`` that does not give the same weights again.
    """
    training, ranks = _begin(make)
    start = _digest(training.model)
    batches = _adaptive(training, Constant(_sizes(training, ranks, UNEVEN_ACCUMULATION)), probed=True)
    seen: list[list[_Part]] = []
    for _, parts in _steps(training, batches, num_steps):
        seen.append(parts)
        _update(training)
    batches.remove()
    by_hand = _again(make, training, start, ranks)
    _by_hand(by_hand, seen, ranks)
    difference = _difference(_state(training), _state(by_hand), ranks)
    passed = difference == 0
    text = f"{num_steps} steps equal to a hand-written loop to the bit"
    if not passed:
        text = f"{num_steps} steps differ from a hand-written loop by {difference:.2g}"
        once_more = _again(make, training, start, ranks)
        _by_hand(once_more, seen, ranks)
        spread = _difference(_state(once_more), _state(by_hand), ranks)
        if spread:
            text += f"; but two hand-written loops differ by {spread:.2g}: see torch.use_deterministic_algorithms"
    return Check("constant policy", passed, difference, 0.0, text)


def resume(make: Make) -> Check:
    """Whether 3 steps, a checkpoint, and 3 steps of a fresh copy that loaded it are 6 steps without one, to the bit.

    It measures the largest difference in weights, buffers, optimizer state, batch state or place in the data. The batch
    grows one step after the checkpoint. The random numbers of torch are put back to those of the checkpoint, as your
    script has to do; augmentation in loading processes draws others after a resume.

    Raises:
        ValueError: a loader that is not a ``GlobalOrder``, whose place in the data cannot be saved; a data set smaller
            than the largest step; or a ``make`` that does not give the same weights again.
    """
    whole, ranks = _begin(make)
    if not isinstance(whole.loader, GlobalOrder):
        raise ValueError(
            f"a resume can be checked with a GlobalOrder only: the place in a {type(whole.loader).__name__} is its own"
        )
    first = 1 if ranks.size > 1 else 2  # with two parts at least there is a spread to measure
    small, large = _sizes(whole, ranks, first), _sizes(whole, ranks, ACCUMULATION)
    schedule = Stages(small, [Stage(steps(STEPS_BEFORE_SAVE + 1), large)])
    total = STEPS_BEFORE_SAVE + STEPS_AFTER_SAVE

    def run_on(training: Training, batches: AdaptiveBatch, until: int) -> None:
        for _ in _steps(training, batches, until):
            _update(training)

    def uninterrupted(training: Training) -> dict[str, Any]:
        batches = _adaptive(training, schedule, probed=True)
        run_on(training, batches, total)
        batches.remove()
        return _state(training, batches)

    start = _digest(whole.model)
    expected = uninterrupted(whole)
    cut = _again(make, whole, start, ranks)
    batches = _adaptive(cut, schedule, probed=True)
    run_on(cut, batches, STEPS_BEFORE_SAVE)
    device = next(cut.model.parameters()).device
    randomness = _Randomness.now(device)
    file = io.BytesIO()
    torch.save(_state(cut, batches), file)
    batches.remove()

    resumed = _again(make, whole, start, ranks)
    batches = _adaptive(resumed, schedule, probed=True)
    file.seek(0)
    saved = torch.load(file, map_location=device, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    batches.load_state_dict(saved["batches"])
    assert isinstance(resumed.loader, GlobalOrder)
    resumed.loader.load_state_dict(saved["order"])
    randomness.restore()
    run_on(resumed, batches, total)
    batches.remove()
    difference = _difference(_state(resumed, batches), expected, ranks)
    passed = difference == 0
    text = f"{STEPS_BEFORE_SAVE} steps, a checkpoint and {STEPS_AFTER_SAVE} more equal {total} uninterrupted to the bit"
    if not passed:
        text = f"a resumed run differs from one without a checkpoint by {difference:.2g} after {total} steps"
        spread = _difference(uninterrupted(_again(make, whole, start, ranks)), expected, ranks)
        if spread:
            text += f"; but two uninterrupted runs differ by {spread:.2g}: see torch.use_deterministic_algorithms"
    return Check("resume", passed, difference, 0.0, text)


def cost(make: Make, *, num_pairs: int = 20, max_cost: float | None = None) -> Check:
    """The time of a step with the probe over one without: median and quartiles of pairs of steps in turn.

    Two copies of the training take turns, so that what else runs on the machine slows both. A step is 4 micro-batches
    a rank, its data and its update; a probe at every step, which ``Control(interval=)`` makes rarer.

    Raises:
        ValueError: a data set smaller than the step, or fewer than 2 pairs.
    """
    if num_pairs < 2:
        raise ValueError(f"quartiles need at least 2 pairs of steps, got {num_pairs}")
    probed, ranks = _begin(make)
    plain = _again(make, probed, _digest(probed.model), ranks)
    policy = Constant(_sizes(probed, ranks, ACCUMULATION))
    both = [_adaptive(probed, policy, probed=True), _adaptive(plain, policy, probed=False)]
    count = WARM_UP_PAIRS + num_pairs
    clocks = [_seconds(training, batches, count) for training, batches in zip((probed, plain), both, strict=True)]
    times = [[0.0] * count, [0.0] * count]
    for pair in range(count):
        for which in (0, 1) if pair % 2 else (1, 0):
            times[which][pair] = next(clocks[which])
    for clock, batches in zip(clocks, both, strict=True):
        clock.close()
        batches.remove()
    sums = ranks.sum_of(*times[0][WARM_UP_PAIRS:], *times[1][WARM_UP_PAIRS:])
    with_probe, without = sums[:num_pairs], sums[num_pairs:]
    ratios = [a / b for a, b in zip(with_probe, without, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    milliseconds = statistics.median(without) / ranks.size * 1e3
    text = (
        f"a probed step takes {median:.3f} (quartiles {low:.3f} to {high:.3f}, {num_pairs} pairs) of one without, "
        f"{milliseconds:.3g} ms"
    )
    return Check("cost", max_cost is None or median <= max_cost, median, max_cost, text)


# --- running --------------------------------------------------------------------------------------------------------


class _Randomness(NamedTuple):
    """Where torch's random numbers stand."""

    host: Tensor
    accelerator: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> _Randomness:
        """The present place."""
        cuda = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None, device)

    def restore(self) -> None:
        """Back to this place."""
        torch.set_rng_state(self.host)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


class _Part(NamedTuple):
    """A micro-batch of this rank, its examples, its weight, and the random numbers that its forward began with."""

    batch: Any
    size: int
    weight: float
    randomness: _Randomness


def _begin(make: Make) -> tuple[Training, Collectives]:
    training = make()
    return training, collectives_of(training.model)


def _again(make: Make, first: Training, start: int, ranks: Collectives) -> Training:
    """A copy of a training as it began, with the weights of digest ``start``."""
    training = make()
    anew = training.model is not first.model and training.optimizer is not first.optimizer
    if ranks.minimum_of(anew, _digest(training.model) == start) != [1.0, 1.0]:
        raise ValueError(
            "make() must build another model and optimizer each time, and the same weights: seed torch in it, before "
            "the model is built"
        )
    return training


def _sizes(training: Training, ranks: Collectives, accumulation: int) -> int:
    """The global batch size of ``accumulation`` micro-batches on each rank."""
    size = training.micro_batch_size * accumulation * ranks.size
    largest = training.micro_batch_size * ACCUMULATION * ranks.size
    if isinstance(training.loader, GlobalOrder) and len(training.loader) < largest:
        raise ValueError(
            f"the checks need steps of {largest} examples ({ranks.size} rank(s) x {ACCUMULATION} micro-batches of "
            f"{training.micro_batch_size}), but the data set has {len(training.loader)}: use more data, or a smaller "
            f"micro_batch_size"
        )
    return size


def _adaptive(training: Training, policy: Schedule, *, probed: bool) -> AdaptiveBatch:
    return AdaptiveBatch(
        training.model,
        training.optimizer,
        policy,
        micro_batch_size=training.micro_batch_size,
        limits=Limits(min=min(policy.fixed_sizes), max=max(policy.fixed_sizes)),
        monitor=probed,
        probe=training.probe if probed else None,
    )


def _steps(training: Training, batches: AdaptiveBatch, until: int) -> Iterator[tuple[Any, list[_Part]]]:
    """The steps of a run up to the ``until``-th, each with its parts, before its update."""
    device = next(training.model.parameters()).device
    for step in batches.steps(training.loader, until=steps(until), count=training.count, weigh=training.weigh):
        parts = []
        for batch in step:
            size = training.count(batch)
            weight = size if training.weigh is None else float(training.weigh(batch))
            parts.append(_Part(batch, size, weight, _Randomness.now(device)))
            step.backward(training.loss(training.model, batch))
        yield step, parts


def _update(training: Training) -> None:
    training.optimizer.step()
    training.optimizer.zero_grad()


def _by_hand(training: Training, seen: Sequence[Sequence[_Part]], ranks: Collectives) -> None:
    """Gradient accumulation as a person writes it, without this library."""
    for parts in seen:
        (total,) = ranks.sum_of(sum(part.weight for part in parts))
        for part in parts:
            part.randomness.restore()
            with nullcontext() if part is parts[-1] else _unreduced(training.model):
                loss = training.loss(training.model, part.batch)
                weight = part.weight * ranks.size  # DDP takes the mean over the ranks, and total is a sum
                whole, rest = divmod(total, weight)
                (loss * (weight / total) if rest else loss / whole).backward()  # type: ignore[no-untyped-call]
        _update(training)


def _unreduced(model: nn.Module) -> Any:
    """A context in which DDP reduces nothing."""
    inner = uncompiled(model)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()


def _seconds(training: Training, batches: AdaptiveBatch, until: int) -> Generator[float, None, None]:
    """The times of the steps of a run, each as it is made."""
    device = next(training.model.parameters()).device
    began = _now(device)
    for step in batches.steps(training.loader, until=steps(until), count=training.count, weigh=training.weigh):
        for batch in step:
            step.backward(training.loss(training.model, batch))
        _update(training)
        yield _now(device) - began
        began = _now(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- gradients part by part -----------------------------------------------------------------------------------------


def _trained(training: Training) -> list[Tensor]:
    """The model's parameters that the optimizer trains."""
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    return [p for p in training.model.parameters() if p.requires_grad and id(p) in held]


def _gradient(training: Training, part: _Part, parameters: Sequence[Tensor], factor: float = 1.0) -> list[Tensor]:
    """What one backward leaves in each parameter, this rank's piece in float64, shape (n,)."""
    for parameter in training.model.parameters():
        parameter.grad = None
    part.randomness.restore()
    (training.loss(training.model, part.batch) * factor).backward()  # type: ignore[no-untyped-call]
    return [_flat(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]


def _flat(grad: Tensor) -> Tensor:
    piece = own_piece(grad.detach())[0]
    dense = piece.to_dense() if piece.is_sparse else piece
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return real.double().reshape(-1)


def _local_moments(
    training: Training, parts: Sequence[_Part], parameters: Sequence[Tensor], ranks: Collectives
) -> GradientMoments:
    """Each rank takes its own parts, and the ranks add up gradients; plain models and DDP."""
    total, num_examples = ranks.sum_of(sum(part.weight for part in parts), sum(part.size for part in parts))
    mean: Tensor | None = None
    part_sq = 0.0
    for part in parts:
        with _unreduced(training.model):
            grad = torch.cat(_gradient(training, part, parameters))
        weight = part.weight / total
        mean = weight * grad if mean is None else mean.add_(grad, alpha=weight)
        part_sq += weight * float(grad.square().sum())
    assert mean is not None
    (part_sq,) = ranks.sum_of(part_sq)
    return _moments_of(part_sq, float(ranks.sum(mean).square().sum()), num_examples, len(parts) * ranks.size)


def _sharded_moments(
    training: Training, parts: Sequence[_Part], parameters: Sequence[Tensor], ranks: Collectives
) -> GradientMoments:
    """Every rank runs a pass for each part of each rank, weighted by zero on all but one; FSDP2."""
    holders = [own_piece(p.detach())[1] for p in parameters]
    (num_examples,) = ranks.sum_of(sum(part.size for part in parts))
    table = ranks.sum_of(*(p.weight if rank == ranks.rank else 0 for rank in range(ranks.size) for p in parts))
    mean: list[Tensor] | None = None
    part_sq = 0.0
    for index, weight in enumerate(table):
        owner, number = divmod(index, len(parts))
        # The reduction takes the mean over the ranks; all but one give zero.
        grads = _gradient(training, parts[number], parameters, float(ranks.size) if owner == ranks.rank else 0.0)
        weight /= sum(table)
        part_sq += weight * sum(float(g.square().sum()) / held for g, held in zip(grads, holders, strict=True))
        weighted = [weight * grad for grad in grads]
        mean = weighted if mean is None else [m.add_(g) for m, g in zip(mean, weighted, strict=True)]
    assert mean is not None
    own_sq = sum(float(m.square().sum()) / held for m, held in zip(mean, holders, strict=True))
    part_sq, grad_sq = ranks.sum_of(part_sq, own_sq)
    return _moments_of(part_sq, grad_sq, num_examples, len(table))


def _moments_of(part_sq: float, grad_sq: float, num_examples: float, num_parts: int) -> GradientMoments:
    """Each part counts for as many examples as it weighs, so their harmonic mean by weight is the plain mean."""
    return GradientMoments(part_sq, num_examples / num_parts, grad_sq, num_examples, num_parts)


def _relative_error(found: float, expected: float) -> float:
    """Infinite where either is not a number."""
    error = abs(found - expected)
    if error == 0:
        return 0.0
    return error / max(abs(found), abs(expected)) if math.isfinite(error) else math.inf


# --- comparing ------------------------------------------------------------------------------------------------------


def _state(training: Training, batches: AdaptiveBatch | None = None) -> dict[str, Any]:
    """What a checkpoint would hold."""
    state: dict[str, Any] = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    if batches is not None:
        state["batches"] = batches.state_dict()
        if isinstance(training.loader, GlobalOrder):
            state["order"] = training.loader.state_dict()
    return state


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers in nested containers, by their paths."""
    if isinstance(value, Tensor):
        yield path, own_piece(value.detach())[0]
    elif isinstance(value, bool | int | float):
        yield path, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any], ranks: Collectives) -> float:
    """The largest difference of any number on any rank; infinite where the structures or non-finite values differ."""
    mine, other = dict(_leaves(found)), dict(_leaves(expected))
    worst = 0.0 if mine.keys() == other.keys() else math.inf
    for path in mine.keys() & other.keys():
        worst = max(worst, _apart(mine[path], other[path]))
    return _largest(worst, ranks)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    unequal = (a != b) & ~((a != a) & (b != b))  # two NaN are equal here
    if not bool(unequal.any()):
        return 0.0
    apart = (a[unequal].to(torch.complex128) - b[unequal].to(torch.complex128)).abs().max().item()
    return apart if math.isfinite(apart) else math.inf


def _largest(value: float, ranks: Collectives) -> float:
    return -ranks.minimum_of(-value)[0]


def _digest(model: nn.Module) -> int:
    """48 bits of a hash over the bytes of all parameters that this rank holds."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        piece = own_piece(parameter.detach())[0].reshape(-1).contiguous().cpu()
        digest.update(f"{name} {tuple(piece.shape)} {piece.dtype}".encode())
        digest.update(piece.view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:6])


def _odd_ranks(model: nn.Module, ranks: Collectives) -> list[int]:
    """The ranks whose parameters are not those of most; of two, the second."""
    if is_sharded(model):
        return []
    mine = [_digest(model) if rank == ranks.rank else 0 for rank in range(ranks.size)]
    digests = ranks.sum_of(*mine)  # exact: 48 bits, and zeros
    (usual, _), *_ = Counter(digests).most_common()  # of equally many, the first
    return [rank for rank, digest in enumerate(digests) if digest != usual]


def _named(odd: Sequence[int]) -> str:
    return f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
